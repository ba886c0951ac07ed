// Packed files in the forms of other programs: the same weights, value for value.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/export/export_gguf.h"
#include "stbllm/export/export_hf.h"
#include "stbllm/export/flip_signs.h"
#include "stbllm/model/load_model.h"
#include "stbllm/model/table.h"
#include "stbllm/run/quantize_model.h"
#include "support/calibration_text.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/naive_gguf.h"
#include "support/recipes.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using test::expect_error;

/// A tiny checkpoint and its packed file.
class Workplace {
 public:
  Workplace(const test::TinyModel& model, const Recipe& recipe) {
    test::write_checkpoint(checkpoint(), model);
    const std::string text = test::write_calibration_text(scratch_.path());
    QuantizeOptions options;
    options.output = packed_path();
    const Checkpoint opened = Checkpoint::open(checkpoint());
    quantize_model(opened, make_calibration(opened, text, /*nsamples=*/4, 0, /*seqlen=*/32, /*seed=*/0),
                   recipe, options);
  }

  fs::path checkpoint() const { return scratch_ / "checkpoint"; }
  fs::path packed_path() const { return scratch_ / "packed.safetensors"; }
  fs::path operator/(const char* name) const { return scratch_ / name; }
  PackedReader packed() const { return PackedReader::open(packed_path()); }

  static at::Tensor logits(const fs::path& model) {
    const LoadedModel loaded = load_model(model.string(), "reference", "float32");
    auto ids = loaded.tokenizer->encode(test::calibration_text(200, /*seed=*/2));
    ids.resize(24);
    const Windows windows = {ids};
    return loaded.decoder.logits(final_hidden_states(loaded.decoder, windows));
  }

 private:
  test::ScratchDirectory scratch_;
};

/// Rows of 256 and of 96 weights.
test::TinyModel ternary_model(test::TinyModel model) {
  model.config.update({{"hidden_size", 256}, {"intermediate_size", 96}, {"num_hidden_layers", 1}});
  return model;
}

Recipe ternary_recipe(RowCoding tables = RowCoding::kInt8) {
  Recipe recipe = Recipe::load("gguf-ternary");
  recipe.model.embedding = recipe.model.head = tables;
  return recipe;
}

// --- flipped signs ----------------------------------------------------------------------------------------

TEST(FlipSigns, FlipsTheAskedShareOutsideOfSalientAndOutlierColumns) {
  for (const char* preset : {"stbllm", "stbllm-paper"}) {  // outlier columns; salient columns
    const Workplace place(test::tiny_llama(), Recipe::load(preset));
    const PackedReader packed = place.packed();
    const fs::path none = place / "none", some = place / "some", every = place / "every";
    EXPECT_EQ(flip_signs(packed, none, 0, /*seed=*/0, false).flipped, 0);
    const FlippedSigns quarter = flip_signs(packed, some, 0.25, /*seed=*/0, false);
    // Six standard deviations of a binomial distribution.
    EXPECT_NEAR(static_cast<double>(quarter.flipped), 0.25 * static_cast<double>(quarter.kept),
                6 * std::sqrt(0.1875 * static_cast<double>(quarter.kept)));
    const FlippedSigns full = flip_signs(packed, every, 1, /*seed=*/0, false);
    EXPECT_EQ(full.flipped, full.kept);

    const PackedReader same = PackedReader::open(none), flipped = PackedReader::open(every);
    flipped.verify_checksums();
    for (const auto& [name, matrix] : packed.linears()) {
      const at::Tensor before = unpack_dense(matrix), after = unpack_dense(flipped.linears().at(name));
      EXPECT_TRUE(unpack_dense(same.linears().at(name)).equal(before)) << name;
      at::Tensor expected = -before;
      const BinarizedWeight weight = unpack_weight(matrix);
      for (const at::Tensor& columns : {weight.salient_columns, weight.outlier_columns})
        if (columns.defined())
          expected.index_copy_(1, columns.to(at::kLong), before.index_select(1, columns.to(at::kLong)));
      EXPECT_TRUE(after.equal(expected)) << name;
    }
    EXPECT_TRUE(Workplace::logits(none).equal(Workplace::logits(place.packed_path())));
    EXPECT_FALSE(Workplace::logits(every).equal(Workplace::logits(place.packed_path())));
    expect_error(ErrorCode::kExists, "--force", [&] { flip_signs(packed, every, 1, /*seed=*/0, false); });
  }
}

// --- HuggingFace ------------------------------------------------------------------------------------------

TEST(ExportHf, HoldsTheWeightsOfThePackedFile) {
  for (const test::TinyModel& model : {test::tiny_llama(), test::tiny_opt(), test::tiny_qwen3()}) {
    const Workplace place(model, Recipe::load("stbllm"));
    const fs::path directory = place / "hf";
    export_hf(place.packed(), directory, "float32");
    EXPECT_EQ(test::list(directory), (std::vector<std::string>{"config.json", "model.safetensors",
                                                               "tokenizer.json", "tokenizer_config.json"}));
    const Checkpoint written = Checkpoint::open(directory);
    const PackedReader packed = place.packed();
    EXPECT_EQ(written.names(), Checkpoint::open(place.checkpoint()).names());
    for (const auto& [name, matrix] : packed.linears()) {
      const Layout& layout = matrix.layout();
      EXPECT_TRUE(written.load(name + ".weight", {layout.rows, layout.cols}).equal(unpack_dense(matrix)))
          << name;
    }
    for (const auto& [name, rows] : packed.quantized_rows()) {
      const auto& layout = rows.layout();
      EXPECT_TRUE(written.load(name + ".weight", {layout.rows, layout.cols}).equal(dense_rows(rows))) << name;
    }
    // The order of float32 sums differs.
    EXPECT_TRUE(
        at::allclose(Workplace::logits(directory), Workplace::logits(place.packed_path()), 1e-4, 1e-4));
  }
}

TEST(ExportHf, SaysWhichDtypeItsWeightsHave) {
  test::TinyModel model = test::tiny_llama();
  model.config["torch_dtype"] = "float16";
  const Workplace place(model, Recipe::load("stbllm"));
  for (const auto& [name, type] :
       {std::pair{"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}}) {
    export_hf(place.packed(), place / name, name);
    const Checkpoint written = Checkpoint::open(place / name);
    EXPECT_EQ(written.config()["torch_dtype"], name);
    const PackedReader packed = place.packed();
    for (const auto& [linear, matrix] : packed.linears()) {
      const at::Tensor weight =
          written.load(linear + ".weight", {matrix.layout().rows, matrix.layout().cols});
      EXPECT_TRUE(weight.equal(unpack_dense(matrix).to(type))) << linear << " in " << name;
    }
  }
  expect_error(ErrorCode::kUsage, "int8", [&] { export_hf(place.packed(), place / "other", "int8"); });
  EXPECT_FALSE(fs::exists(place / "other"));
}

// --- GGUF -------------------------------------------------------------------------------------------------

/// The rows of a linear of `heads` heads in llama.cpp's order for families whose neighbouring rows turn
/// together: halves of a head in turn.
at::Tensor interleaved(const at::Tensor& weight, int64_t heads) {
  std::vector<int64_t> shape = {heads, 2, weight.size(0) / heads / 2};
  for (int64_t d = 1; d < weight.dim(); ++d) shape.push_back(weight.size(d));
  return weight.reshape(shape).transpose(1, 2).reshape(weight.sizes());
}

at::Tensor tensor_of(const test::GgufTensor& tensor) {
  return at::tensor(tensor.values).reshape(tensor.shape);
}

constexpr uint32_t kF32 = 0, kF16 = 1, kQ4 = 2, kQ8 = 8, kTQ1 = 34, kTQ2 = 35;

TEST(ExportGguf, HoldsTheWeightsOfThePackedFile) {
  struct Case {
    test::TinyModel model;
    GgufType type;
    RowCoding tables;
    uint32_t ternary, table;
  };
  const Case cases[] = {
      {ternary_model(test::tiny_llama()), GgufType::kTQ2_0, RowCoding::kInt8, kTQ2, kQ8},
      {ternary_model(test::tiny_qwen2()), GgufType::kTQ1_0, RowCoding::kInt4, kTQ1, kQ4},
      {ternary_model(test::tiny_mistral()), GgufType::kTQ1_0, RowCoding::kFloat16, kTQ1, kF16},
  };
  for (const Case& c : cases) {
    const Workplace place(c.model, ternary_recipe(c.tables));
    const PackedReader packed = place.packed();
    const GgufSummary summary = export_gguf(packed, place / "model.gguf", {.ternary = c.type});
    EXPECT_EQ(summary.linears, (std::map<GgufType, int64_t>{{GgufType::kQ4_0, 1}, {c.type, 6}}));
    test::NaiveGguf gguf(test::read_all(place / "model.gguf"));

    const bool llama = gguf.keys["general.architecture"] == "llama";
    const auto& config = c.model.config;
    const auto expected = [&](const std::string& name) {
      if (packed.linears().contains(name)) return unpack_dense(packed.linears().at(name));
      if (packed.quantized_rows().contains(name)) return dense_rows(packed.quantized_rows().at(name));
      const TensorEntry& entry = packed.dense(name + (packed.has_dense(name) ? "" : ".weight"));
      return at::from_blob(const_cast<std::byte*>(entry.data.data()), entry.shape,
                           entry.dtype == "F16" ? at::kHalf : at::kFloat)
          .to(at::kFloat);
    };
    const auto check = [&](const std::string& name, const std::string& of, uint32_t type, int64_t heads = 0) {
      ASSERT_TRUE(gguf.tensors.contains(name)) << name;
      const test::GgufTensor& found = gguf.tensors[name];
      EXPECT_EQ(found.type, type) << name;
      const at::Tensor weight = heads > 0 && llama ? interleaved(expected(of), heads) : expected(of);
      EXPECT_TRUE(tensor_of(found).equal(weight)) << name;
      gguf.tensors.erase(name);
    };
    const std::string block = "model.layers.0.";
    const int64_t heads = config["num_attention_heads"], kv_heads = config["num_key_value_heads"];
    check("blk.0.attn_q.weight", block + "self_attn.q_proj", c.ternary, heads);
    check("blk.0.attn_k.weight", block + "self_attn.k_proj", c.ternary, kv_heads);
    check("blk.0.attn_v.weight", block + "self_attn.v_proj", c.ternary);
    check("blk.0.attn_output.weight", block + "self_attn.o_proj", c.ternary);
    check("blk.0.ffn_gate.weight", block + "mlp.gate_proj", c.ternary);
    check("blk.0.ffn_up.weight", block + "mlp.up_proj", c.ternary);
    check("blk.0.ffn_down.weight", block + "mlp.down_proj", kQ4);  // 96 columns
    check("blk.0.attn_norm.weight", block + "input_layernorm", kF32);
    check("blk.0.ffn_norm.weight", block + "post_attention_layernorm", kF32);
    if (!llama) {
      check("blk.0.attn_q.bias", block + "self_attn.q_proj.bias", kF32);
      check("blk.0.attn_k.bias", block + "self_attn.k_proj.bias", kF32);
      check("blk.0.attn_v.bias", block + "self_attn.v_proj.bias", kF32);
    }
    check("token_embd.weight", "model.embed_tokens", c.table);
    check("output_norm.weight", "model.norm", kF32);
    if (!config["tie_word_embeddings"]) check("output.weight", "lm_head", c.table);
    EXPECT_TRUE(gguf.tensors.empty()) << gguf.tensors.begin()->first;
  }
}

TEST(ExportGguf, SaysHowTheModelRuns) {
  test::TinyModel model = ternary_model(test::tiny_llama());
  model.config["rope_scaling"] = {{"rope_type", "llama3"},
                                  {"factor", 8.0},
                                  {"low_freq_factor", 1.0},
                                  {"high_freq_factor", 4.0},
                                  {"original_max_position_embeddings", 64}};
  const Workplace place(model, ternary_recipe());
  export_gguf(place.packed(), place / "model.gguf", {});
  test::NaiveGguf gguf(test::read_all(place / "model.gguf"));
  EXPECT_EQ(gguf.keys["llama.context_length"], 128);
  EXPECT_EQ(gguf.keys["llama.embedding_length"], 256);
  EXPECT_EQ(gguf.keys["llama.feed_forward_length"], 96);
  EXPECT_EQ(gguf.keys["llama.block_count"], 1);
  EXPECT_EQ(gguf.keys["llama.attention.head_count"], 4);
  EXPECT_EQ(gguf.keys["llama.attention.head_count_kv"], 2);
  EXPECT_EQ(gguf.keys["llama.rope.dimension_count"], 64);
  EXPECT_EQ(gguf.keys["llama.rope.freq_base"], 10000.0f);
  EXPECT_EQ(gguf.keys["llama.attention.layer_norm_rms_epsilon"], 1e-5f);
  // Waves are divided by their factor: the shortest stay, the longest take all of it.
  const std::vector<float>& factors = gguf.tensors["rope_freqs.weight"].values;
  ASSERT_EQ(factors.size(), 32u);
  EXPECT_FLOAT_EQ(factors.front(), 1);
  EXPECT_FLOAT_EQ(factors.back(), 8);

  EXPECT_EQ(gguf.keys["tokenizer.ggml.model"], "gpt2");
  EXPECT_EQ(gguf.keys["tokenizer.ggml.pre"], "gpt-2");
  EXPECT_EQ(gguf.keys["tokenizer.ggml.bos_token_id"], 0);
  EXPECT_EQ(gguf.keys["tokenizer.ggml.add_bos_token"], true);
  EXPECT_EQ(gguf.keys["tokenizer.ggml.eos_token_id"], 2);
  EXPECT_EQ(gguf.keys["tokenizer.ggml.merges"], test::kTinyMerges);
  const auto tokens = gguf.keys["tokenizer.ggml.tokens"].get<std::vector<std::string>>();
  const auto types = gguf.keys["tokenizer.ggml.token_type"].get<std::vector<int>>();
  ASSERT_EQ(std::ssize(tokens), test::kTinyVocabSize);
  ASSERT_EQ(types.size(), tokens.size());
  EXPECT_EQ(tokens[2], "</s>");
  EXPECT_EQ(types[2], 3);  // control
  EXPECT_EQ(tokens.back(), "Ġand");
  EXPECT_EQ(types.back(), 1);  // normal
}

TEST(ExportGguf, ContextsEndWithASlidingWindow) {
  const Workplace place(ternary_model(test::tiny_mistral()), ternary_recipe());
  export_gguf(place.packed(), place / "model.gguf", {});
  EXPECT_EQ(test::NaiveGguf(test::read_all(place / "model.gguf")).keys["llama.context_length"], 16);
}

TEST(ExportGguf, RefusesWhatIsNotTernaryUnlessItMayRound) {
  const Workplace place(ternary_model(test::tiny_llama()), Recipe::load("stbllm"));
  expect_error(ErrorCode::kUnsupported, "gguf-ternary",
               [&] { export_gguf(place.packed(), place / "model.gguf", {}); });
  EXPECT_FALSE(fs::exists(place / "model.gguf"));
  const GgufSummary summary = export_gguf(place.packed(), place / "model.gguf", {.dequantize = true});
  EXPECT_EQ(summary.linears, (std::map<GgufType, int64_t>{{GgufType::kF16, 7}}));
  const test::NaiveGguf gguf(test::read_all(place / "model.gguf"));
  const PackedReader packed = place.packed();
  const at::Tensor up = unpack_dense(packed.linears().at("model.layers.0.mlp.up_proj"));
  EXPECT_TRUE(tensor_of(gguf.tensors.at("blk.0.ffn_up.weight")).equal(up.to(at::kHalf).to(at::kFloat)));
}

TEST(ExportGguf, RefusesModelsThatLlamaCppDoesNotKnow) {
  const Workplace place(test::tiny_opt(), Recipe::load("stbllm"));
  expect_error(ErrorCode::kUnsupported, "OPTForCausalLM",
               [&] { export_gguf(place.packed(), place / "model.gguf", {.dequantize = true}); });
}

TEST(ExportGguf, ReplacesAFileOnlyWhenForced) {
  const Workplace place(ternary_model(test::tiny_llama()), ternary_recipe());
  test::write_text(place / "model.gguf", "something else");
  expect_error(ErrorCode::kExists, "--force", [&] { export_gguf(place.packed(), place / "model.gguf", {}); });
  EXPECT_EQ(test::read_all(place / "model.gguf"), "something else");
  export_gguf(place.packed(), place / "model.gguf", {.force = true});
  EXPECT_EQ(test::read_all(place / "model.gguf").substr(0, 4), "GGUF");
}

}  // namespace
}  // namespace stbllm
