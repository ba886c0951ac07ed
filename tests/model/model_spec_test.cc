#include "stbllm/model/model_spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "stbllm/base/error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using nlohmann::json;
using test::TinyModel;
using testing::HasSubstr;

/// `model.config` with `key` changed.
json with(const TinyModel& model, const std::string& key, const json& value) {
  json config = model.config;
  config[key] = value;
  return config;
}

struct Refusal {
  std::string name;
  json config;
  ErrorCode code;
  std::vector<std::string> named;  ///< words the sentence must hold
};
void PrintTo(const Refusal& value, std::ostream* out) { *out << value.name; }

class ModelSpecRefusal : public testing::TestWithParam<Refusal> {};

TEST_P(ModelSpecRefusal, NamesKeyAndValue) {
  try {
    ModelSpec::from_config(GetParam().config);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), GetParam().code);
    for (const std::string& word : GetParam().named) EXPECT_THAT(error.what(), HasSubstr(word));
  }
}

std::vector<Refusal> refusals() {
  const TinyModel llama = test::tiny_llama(), mistral = test::tiny_mistral(), qwen3 = test::tiny_qwen3(),
                  opt = test::tiny_opt();
  const auto no_key = [&](const std::string& key) {
    json config = llama.config;
    config.erase(key);
    return config;
  };
  const json yarn = {{"rope_type", "yarn"}, {"factor", 4.0}};
  const json dynamic = {{"type", "dynamic"}, {"factor", 2.0}};
  const json per_kind = {{"full_attention", {{"rope_theta", 1e4}}}};
  const ErrorCode unsupported = ErrorCode::kUnsupported, corrupt = ErrorCode::kCorrupt;
  return {
      {"Architecture",
       with(llama, "architectures", {"GPT2LMHeadModel"}),
       unsupported,
       {"architectures", "GPT2LMHeadModel", "LlamaForCausalLM"}},
      {"NoArchitecture", no_key("architectures"), unsupported, {"architectures"}},
      {"QuantizedCheckpoint",
       with(llama, "quantization_config", {{"bits", 4}}),
       unsupported,
       {"quantization_config", "4"}},
      {"RopeYarn", with(llama, "rope_parameters", yarn), unsupported, {"rope_parameters.rope_type", "yarn"}},
      {"RopeDynamic", with(llama, "rope_scaling", dynamic), unsupported, {"rope_scaling.type", "dynamic"}},
      {"RopePerKind",
       with(llama, "rope_parameters", per_kind),
       unsupported,
       {"rope_parameters", "full_attention"}},
      {"RopeLinearWithoutFactor",
       with(llama, "rope_scaling", {{"type", "linear"}}),
       corrupt,
       {"rope_scaling.factor"}},
      {"PartialRotary",
       with(llama, "partial_rotary_factor", 0.5),
       unsupported,
       {"partial_rotary_factor", "0.5"}},
      {"OddHeadDim", with(llama, "head_dim", 15), unsupported, {"head_dim", "15"}},
      {"Activation", with(llama, "hidden_act", "relu2"), unsupported, {"hidden_act", "relu2"}},
      {"OptActivation",
       with(opt, "activation_function", "mish"),
       unsupported,
       {"activation_function", "mish"}},
      {"LayerTypes",
       with(mistral, "layer_types", {"full_attention", "sliding_attention"}),
       unsupported,
       {"layer_types", "full_attention"}},
      {"UseSlidingWindow",
       with(llama, "use_sliding_window", true),
       unsupported,
       {"use_sliding_window", "true"}},
      {"Qwen3SlidingWindow",
       with(qwen3, "use_sliding_window", true),
       unsupported,
       {"use_sliding_window", "true"}},
      {"Qwen3LayerTypes",
       with(qwen3, "layer_types", {"full_attention", "sliding_attention"}),
       unsupported,
       {"layer_types", "sliding_attention"}},
      {"SoftCap", with(llama, "attn_logit_softcapping", 50.0), unsupported, {"attn_logit_softcapping", "50"}},
      {"MissingSize", no_key("hidden_size"), corrupt, {"hidden_size", "missing"}},
      {"NegativeSize", with(llama, "num_hidden_layers", -1), corrupt, {"num_hidden_layers", "-1"}},
      {"HugeSize", with(llama, "hidden_size", int64_t{1} << 40), corrupt, {"hidden_size", "from 1 to"}},
      {"TooManyBlocks", with(llama, "num_hidden_layers", 1000000), corrupt, {"num_hidden_layers", "at most"}},
      {"TooWide", with(llama, "intermediate_size", 1 << 23), corrupt, {"intermediate_size", "at most"}},
      {"TooWideHeads", with(llama, "head_dim", 1 << 22), corrupt, {"head_dim", "at most"}},
      {"FarStopId", with(llama, "eos_token_id", int64_t{1} << 40), corrupt, {"eos_token_id", "token id"}},
      {"TextForSize", with(llama, "vocab_size", "many"), corrupt, {"vocab_size", "many"}},
      {"NumberForFlag", with(llama, "attention_bias", 1), corrupt, {"attention_bias", "1"}},
      {"HeadsAndKeyHeads", with(llama, "num_key_value_heads", 3), corrupt, {"num_key_value_heads", "3"}},
      {"HiddenAndHeads", with(llama, "hidden_size", 66), corrupt, {"hidden_size", "66"}},
      {"NotAnObject", json::array(), corrupt, {"config.json"}},
  };
}
INSTANTIATE_TEST_SUITE_P(, ModelSpecRefusal, testing::ValuesIn(refusals()),
                         [](const auto& info) { return info.param.name; });

TEST(ModelSpec, ReadsBothSpellingsOfRotaryParameters) {
  const json scaling = {{"factor", 8.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 64}};
  json older = test::tiny_llama().config;
  older["rope_theta"] = 5e5;
  older["rope_scaling"] = scaling;
  older["rope_scaling"]["rope_type"] = "llama3";
  json newer = test::tiny_llama().config;
  newer.erase("rope_theta");
  newer["rope_parameters"] = older["rope_scaling"];
  newer["rope_parameters"]["rope_theta"] = 5e5;
  for (const json& config : {older, newer}) {
    const Rope rope = ModelSpec::from_config(config).rope;
    EXPECT_EQ(rope.theta, 5e5);
    EXPECT_EQ(rope.scaling, Rope::Scaling::kLlama3);
    EXPECT_EQ(rope.factor, 8.0);
    EXPECT_EQ(rope.original_max_positions, 64);
  }
}

TEST(ModelSpec, StopsAtOneTokenOrAtSeveral) {
  EXPECT_EQ(ModelSpec::from_config(with(test::tiny_llama(), "eos_token_id", 2)).stop_ids,
            std::vector<int32_t>{2});
  EXPECT_EQ(ModelSpec::from_config(with(test::tiny_llama(), "eos_token_id", {2, 7})).stop_ids,
            (std::vector<int32_t>{2, 7}));
  EXPECT_EQ(ModelSpec::from_config(with(test::tiny_llama(), "eos_token_id", nullptr)).stop_ids,
            std::vector<int32_t>{});
}

TEST(ModelSpec, MistralHasAWindowUnlessItSaysNone) {
  json config = test::tiny_mistral().config;
  config["sliding_window"] = nullptr;
  EXPECT_EQ(ModelSpec::from_config(config).sliding_window, 0);
  config.erase("sliding_window");
  EXPECT_EQ(ModelSpec::from_config(config).sliding_window, 4096);
}

TEST(ModelSpec, ListsLinearsWithNameShapeAndTap) {
  const ModelSpec spec = ModelSpec::from_config(test::tiny_llama().config);
  const std::vector<LinearSpec> linears = spec.linears(1);
  ASSERT_EQ(linears.size(), 7u);
  EXPECT_EQ(linears[1].name, "model.layers.1.self_attn.k_proj");
  EXPECT_EQ(linears[1].rows, 32);  // two heads of sixteen
  EXPECT_EQ(linears[1].cols, 64);
  EXPECT_EQ(linears[1].tap, Tap::kAttnIn);
  EXPECT_EQ(linears[6].name, "model.layers.1.mlp.down_proj");
  EXPECT_EQ(linears[6].cols, 168);
  EXPECT_EQ(linears[6].tap, Tap::kMlpMid);
  EXPECT_FALSE(linears[6].has_bias);
  EXPECT_EQ(spec.linear_weights(), 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 168 * 64));

  const std::vector<LinearSpec> opt = ModelSpec::from_config(test::tiny_opt().config).linears(0);
  ASSERT_EQ(opt.size(), 6u);
  EXPECT_EQ(opt[3].name, "model.decoder.layers.0.self_attn.out_proj");
  EXPECT_EQ(opt[4].name, "model.decoder.layers.0.fc1");
  EXPECT_TRUE(opt[4].has_bias);
}

TEST(ModelSpec, ListsNormsWithNameRoleAndWidth) {
  const std::vector<NormSpec> norms = ModelSpec::from_config(test::tiny_qwen3().config).norms(1);
  ASSERT_EQ(norms.size(), 4u);
  EXPECT_EQ(norms[0].name, "model.layers.1.input_layernorm");
  EXPECT_EQ(norms[0].role, NormRole::kAttn);
  EXPECT_EQ(norms[0].width, 64);
  EXPECT_EQ(norms[2].name, "model.layers.1.self_attn.k_norm");
  EXPECT_EQ(norms[2].role, NormRole::kKey);
  EXPECT_EQ(norms[2].width, 24);
  ASSERT_EQ(norms[2].tensors.size(), 1u);
  EXPECT_EQ(norms[2].tensors[0].name, "model.layers.1.self_attn.k_norm.weight");

  const std::vector<NormSpec> opt = ModelSpec::from_config(test::tiny_opt().config).norms(0);
  ASSERT_EQ(opt.size(), 2u);
  EXPECT_EQ(opt[1].tensors.size(), 2u);  // weight and bias
}

TEST(ModelSpec, HeadsOfQwen3Have128DimensionsUnlessItSaysElse) {
  json config = test::tiny_qwen3().config;
  EXPECT_EQ(ModelSpec::from_config(config).head_dim, 24);
  config.erase("head_dim");
  EXPECT_EQ(ModelSpec::from_config(config).head_dim, 128);
}

class ModelSpecTensors : public testing::TestWithParam<TinyModel> {};

TEST_P(ModelSpecTensors, OtherTensorsAndLinearsAreExactlyTheCheckpoint) {
  const ModelSpec spec = ModelSpec::from_config(GetParam().config);
  test::TensorShapes found;
  for (const TensorSpec& tensor : spec.other_tensors())
    EXPECT_TRUE(found.emplace(tensor.name, tensor.shape).second);
  for (int64_t block = 0; block < spec.layers; ++block)
    for (const LinearSpec& linear : spec.linears(block))
      EXPECT_TRUE(found.emplace(linear.weight().name, linear.weight().shape).second);
  EXPECT_EQ(found, test::tensor_shapes(GetParam().config));
}

TinyModel with_biases() {
  TinyModel model = test::tiny_llama();
  model.config["attention_bias"] = true;
  model.config["mlp_bias"] = true;
  model.config["tie_word_embeddings"] = true;
  return model;
}
INSTANTIATE_TEST_SUITE_P(, ModelSpecTensors,
                         testing::Values(test::tiny_llama(), with_biases(), test::tiny_mistral(),
                                         test::tiny_qwen3(), test::tiny_opt(), test::tiny_opt_350m()));

TEST(ModelSpec, ChecksEveryTensorBeforeWork) {
  test::ScratchDirectory directory;
  TinyModel model = test::tiny_llama();
  test::write_checkpoint(directory.path(), model);
  EXPECT_NO_THROW(ModelSpec::from_checkpoint(Checkpoint::open(directory.path())));

  const auto expect_mismatch = [&](const json& config, const std::vector<std::string>& words) {
    test::write_text(directory / "config.json", config.dump());
    try {
      ModelSpec::from_checkpoint(Checkpoint::open(directory.path()));
      FAIL() << "accepted " << config;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kMismatch);
      for (const std::string& word : words) EXPECT_THAT(error.what(), HasSubstr(word));
    }
  };
  expect_mismatch(with(model, "num_hidden_layers", 3), {"model.layers.2.", "missing"});
  expect_mismatch(with(model, "num_hidden_layers", 1), {"model.layers.1.", "no place"});
  expect_mismatch(with(model, "mlp_bias", true), {"mlp.gate_proj.bias", "missing"});
  expect_mismatch(with(model, "intermediate_size", 176), {"mlp.gate_proj.weight", "[168, 64]", "[176, 64]"});
}

}  // namespace
}  // namespace stbllm
