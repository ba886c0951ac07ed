// The one forward pass against a second implementation in plain loops, on random models of every family.

#include "stbllm/model/decoder.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/naive_transformer.h"
#include "stbllm/base/error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using nlohmann::json;
using test::NaiveTransformer;
using test::ScratchDirectory;
using test::TinyModel;

/// Tensors here are tiny: more threads would only wait for each other.
[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

struct Case {
  std::string name;
  TinyModel model;
};
void PrintTo(const Case& value, std::ostream* out) { *out << value.name; }

TinyModel changed(TinyModel model, const json& changes) {
  model.config.update(changes);
  return model;
}

std::vector<Case> cases() {
  const TinyModel llama = test::tiny_llama(), qwen3 = test::tiny_qwen3(), opt = test::tiny_opt();
  const json llama3 = {
      {"rope_type", "llama3"},
      {"rope_theta", 500.0},
      {"factor", 8.0},
      {"low_freq_factor", 1.0},
      {"high_freq_factor", 4.0},
      {"original_max_position_embeddings", 32}};  // all three bands occur among the 8 frequencies
  const json qwen2 = {{"architectures", json::array({"Qwen2ForCausalLM"})},
                      {"model_type", "qwen2"},
                      {"attention_bias", true}};  // makes the file hold the biases that the class always has
  return {
      {"Llama", llama},
      {"LlamaTied", changed(llama, {{"tie_word_embeddings", true}})},
      {"LlamaBiases", changed(llama, {{"attention_bias", true}, {"mlp_bias", true}})},
      {"LlamaHeadDim", changed(llama, {{"head_dim", 32}})},
      {"LlamaOneKeyHead", changed(llama, {{"num_key_value_heads", 1}})},
      {"LlamaAllKeyHeads", changed(llama, {{"num_key_value_heads", 4}})},
      {"LlamaGelu", changed(llama, {{"hidden_act", "gelu_pytorch_tanh"}})},
      {"LlamaRopeLinear", changed(llama, {{"rope_scaling", {{"type", "linear"}, {"factor", 4.0}}}})},
      {"LlamaRopeLlama3", changed(llama, {{"rope_parameters", llama3}})},
      {"Mistral", test::tiny_mistral()},
      {"MistralWithoutWindow", changed(test::tiny_mistral(), {{"sliding_window", nullptr}})},
      {"Qwen2", changed(llama, qwen2)},
      {"Qwen3", qwen3},
      {"Qwen3Biases", changed(qwen3, {{"attention_bias", true}})},
      {"Qwen3Untied", changed(qwen3, {{"tie_word_embeddings", false}})},
      {"Qwen3RopeLlama3", changed(qwen3, {{"rope_parameters", llama3}})},
      {"Opt", opt},
      {"OptGelu", changed(opt, {{"activation_function", "gelu"}})},
      {"OptWithoutBias", changed(opt, {{"enable_bias", false}})},
      {"OptPlainNorms", changed(opt, {{"layer_norm_elementwise_affine", false}})},
      {"OptWithoutFinalNorm", changed(opt, {{"_remove_final_layer_norm", true}})},
      {"OptUntied", changed(opt, {{"tie_word_embeddings", false}})},
      {"Opt350m", test::tiny_opt_350m()},
  };
}

std::vector<int32_t> some_ids(int64_t count, int64_t seed = 0) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>((seed + 7 + i * i * 31 + i * 5) % test::kTinyVocabSize));
  return ids;
}

at::Tensor batch_of(const std::vector<std::vector<int32_t>>& rows) {
  std::vector<at::Tensor> tensors;
  for (const auto& row : rows) tensors.push_back(at::tensor(row, at::kInt));
  return at::stack(tensors);
}

at::Tensor as_tensor(const NaiveTransformer::Matrix& rows) {
  std::vector<at::Tensor> tensors;
  for (const auto& row : rows) tensors.push_back(at::tensor(row, at::kDouble));
  return at::stack(tensors);
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

Decoder open_decoder(const ScratchDirectory& directory, const TinyModel& model,
                     const DecoderOptions& options = {}) {
  test::write_checkpoint(directory.path(), model);
  return Decoder::from_checkpoint(Checkpoint::open(directory.path()), options);
}

class DecoderOfEveryFamily : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(, DecoderOfEveryFamily, testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

// Two blocks of sums of at most 176 products in float32: about 10 roundings deep, logits are below 10.
constexpr double kFloat32Tolerance = 10 * 10 * 1.2e-7 * 10;

TEST_P(DecoderOfEveryFamily, MatchesPlainLoops) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory, GetParam().model);
  const std::vector<std::vector<int32_t>> rows = {some_ids(40), some_ids(40, 100)};
  const NaiveTransformer naive(GetParam().model);
  for (const bool autograd :
       {true, false}) {  // libtorch's operations, and those that do several of them in one pass
    const at::AutoGradMode mode(autograd);
    const at::Tensor logits = decoder.logits(decoder.forward(batch_of(rows)));
    for (size_t i = 0; i < rows.size(); ++i)
      EXPECT_LT(largest_difference(logits[static_cast<int64_t>(i)], as_tensor(naive.logits(rows[i]))),
                kFloat32Tolerance)
          << autograd;
  }
}

TEST_P(DecoderOfEveryFamily, CacheGivesTheSameAsOneForward) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory, GetParam().model, {.keep_blocks = true});
  const at::Tensor ids = batch_of({some_ids(40), some_ids(40, 100)});
  const at::Tensor whole = decoder.forward(ids);
  for (const bool autograd : {true, false}) {
    const at::AutoGradMode mode(autograd);
    KeyValueCache cache = decoder.make_cache(2, 40);
    std::vector<at::Tensor> parts;
    int64_t first = 0;
    for (const int64_t count : {5, 1, 12, 1, 1, 1, 19}) {
      parts.push_back(decoder.forward(ids.slice(1, first, first + count), &cache));
      first += count;
    }
    EXPECT_EQ(cache.length(), 40);
    EXPECT_LT(largest_difference(at::cat(parts, 1), whole), kFloat32Tolerance) << autograd;
    EXPECT_THROW(decoder.forward(ids.slice(1, 0, 1), &cache), Error);  // full
  }
}

TEST(Decoder, HalfPrecisionFilesAreWidenedExactly) {
  for (const std::string dtype : {"F16", "BF16"}) {
    ScratchDirectory directory;
    TinyModel model = test::tiny_llama();
    model.dtype = dtype;
    const Decoder decoder = open_decoder(directory, model);
    NaiveTransformer naive(model);
    const at::ScalarType type = dtype == "F16" ? at::kHalf : at::kBFloat16;
    for (const auto& [name, shape] : test::tensor_shapes(model.config))
      for (double& value : naive.tensor(name))
        value = at::scalar_tensor(value, at::kFloat).to(type).item<double>();
    const at::Tensor logits = decoder.logits(decoder.forward(batch_of({some_ids(12)})));
    EXPECT_LT(largest_difference(logits[0], as_tensor(naive.logits(some_ids(12)))), kFloat32Tolerance);
  }
}

TEST(Decoder, RunsInBfloat16) {
  ScratchDirectory directory;
  const TinyModel model = test::tiny_llama();
  const at::Tensor ids = batch_of({some_ids(40)});
  const Decoder wide = open_decoder(directory, model);
  const Decoder narrow = open_decoder(directory, model, {.dtype = at::kBFloat16});
  const at::Tensor logits = narrow.logits(narrow.forward(ids));
  EXPECT_EQ(logits.scalar_type(), at::kBFloat16);
  const at::Tensor expected = wide.logits(wide.forward(ids));
  // Eight bits of mantissa: 2^-8 per rounding, some ten roundings in a row that add like noise.
  const double error =
      (logits.to(at::kFloat) - expected).norm().item<double>() / expected.norm().item<double>();
  EXPECT_LT(error, 0.02);
  EXPECT_GT(error, 1e-5);  // it did run in bfloat16
}

TEST(Decoder, RefusesOtherActivationTypes) {
  ScratchDirectory directory;
  EXPECT_THROW(open_decoder(directory, test::tiny_llama(), {.dtype = at::kHalf}), Error);
}

TEST(Decoder, OpensCheckpointsSavedWithoutTheHeadClass) {
  ScratchDirectory directory;
  const TinyModel model = test::tiny_opt();
  const at::Tensor ids = batch_of({some_ids(20)});
  const Decoder plain = open_decoder(directory, model);
  const at::Tensor expected = plain.logits(plain.forward(ids));
  SafetensorsWriter writer(directory / "model.safetensors", /*force=*/true);
  for (const auto& [name, shape] : test::tensor_shapes(model.config)) {
    ASSERT_TRUE(name.starts_with("model."));
    writer.add(name.substr(6), "F32", shape,
               test::encode(test::tensor_values(name, shape, model.seed), "F32"));
  }
  writer.finish();
  writer.commit();
  const Decoder bare = Decoder::from_checkpoint(Checkpoint::open(directory.path()));
  EXPECT_EQ(bare.spec().linears(0)[0].name, "decoder.layers.0.self_attn.q_proj");
  EXPECT_TRUE(at::equal(bare.logits(bare.forward(ids)), expected));
}

TEST(Decoder, BlockIsDroppedUnlessKept) {
  ScratchDirectory directory;
  for (const bool keep : {false, true}) {
    const Decoder decoder = open_decoder(directory, test::tiny_llama(), {.keep_blocks = keep});
    const int64_t before = decoder.bytes();
    std::weak_ptr<DecoderBlock> block = decoder.block(1);
    EXPECT_EQ(block.expired(), !keep);
    EXPECT_EQ(decoder.bytes() > before, keep);
  }
}

TEST(DecoderBlock, ObserverSeesTheInputOfEveryTapInOrder) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory, test::tiny_llama());
  const at::Tensor hidden = decoder.embed(batch_of({some_ids(9), some_ids(9, 3)}));
  const auto block = decoder.block(0);
  std::vector<std::pair<Tap, at::Tensor>> seen;
  const at::Tensor output =
      block->forward(hidden, decoder.positions(0, 9),
                     [&](Tap tap, const at::Tensor& input) { seen.emplace_back(tap, input); });
  ASSERT_EQ(seen.size(), 4u);
  const std::vector<Tap> order = {Tap::kAttnIn, Tap::kAttnOut, Tap::kMlpIn, Tap::kMlpMid};
  for (size_t i = 0; i < 4; ++i) EXPECT_EQ(seen[i].first, order[i]);
  EXPECT_TRUE(at::equal(seen[0].second, apply_norm(decoder.spec(), block->norm(NormRole::kAttn), hidden)));
  const at::Tensor middle = hidden + block->linear(Role::kO).forward(seen[1].second);
  EXPECT_TRUE(at::equal(seen[2].second, apply_norm(decoder.spec(), block->norm(NormRole::kMlp), middle)));
  EXPECT_TRUE(at::equal(output, middle + block->linear(Role::kDown).forward(seen[3].second)));
}

TEST(DecoderBlock, ReplacedLinearIsUsedAndKept) {
  ScratchDirectory directory;
  const TinyModel model = test::tiny_opt();
  const Decoder decoder = open_decoder(directory, model, {.keep_blocks = true});
  const at::Tensor weight = at::zeros({64, 64});
  const at::Tensor bias = decoder.block(1)->dense(Role::kV).bias();
  decoder.block(1)->set_linear(Role::kV, std::make_unique<DenseLinear>(weight, bias));
  NaiveTransformer naive(model);
  std::ranges::fill(naive.tensor("model.decoder.layers.1.self_attn.v_proj.weight"), 0.0);
  const at::Tensor logits = decoder.logits(decoder.forward(batch_of({some_ids(20)})));
  EXPECT_LT(largest_difference(logits[0], as_tensor(naive.logits(some_ids(20)))), kFloat32Tolerance);
}

class BlockGradient : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(, BlockGradient,
                         testing::Values(Case{"Llama", test::tiny_llama()},
                                         Case{"Mistral", test::tiny_mistral()},
                                         Case{"Qwen3", test::tiny_qwen3()},
                                         Case{"Opt350m", test::tiny_opt_350m()}),
                         [](const auto& info) { return info.param.name; });

TEST_P(BlockGradient, OfALinearAgreesWithADifferenceQuotient) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory, GetParam().model);
  const at::Tensor hidden = decoder.embed(batch_of({some_ids(40), some_ids(40, 3)}));
  const auto block = decoder.block(0);
  const Positions positions = decoder.positions(0, 40);
  for (const Role role : {Role::kQ, Role::kK, Role::kV, Role::kUp}) {
    const auto& linear = block->dense(role);
    const at::Tensor start = linear.weight(), bias = linear.bias();
    const auto loss = [&](const at::Tensor& weight) {
      block->set_linear(role, std::make_unique<DenseLinear>(weight, bias));
      return block->forward(hidden, positions).square().mean();
    };
    at::Tensor weight = start.clone().set_requires_grad(true);
    loss(weight).backward();
    const at::Tensor direction = weight.grad() / weight.grad().norm();
    const double step = 0.05;
    const double quotient =
        (loss(start + step * direction).item<double>() - loss(start - step * direction).item<double>()) /
        (2 * step);
    const double expected = weight.grad().norm().item<double>();
    // The cubic term of a step of 0.05 against weights of norm 8, and float32 sums in the loss.
    EXPECT_NEAR(quotient, expected, 0.01 * expected) << role_name(role);
    loss(start);
  }
}

TEST_P(BlockGradient, OfANormAgreesWithADifferenceQuotient) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory, GetParam().model);
  const at::Tensor hidden = decoder.embed(batch_of({some_ids(40), some_ids(40, 3)}));
  const auto block = decoder.block(0);
  const Positions positions = decoder.positions(0, 40);
  for (const NormSpec& norm : block->norms()) {
    const at::Tensor start = block->norm(norm.role).weight;
    ASSERT_EQ(start.sizes(), at::IntArrayRef({norm.width}));
    const auto loss = [&](const at::Tensor& weight) {
      block->norm(norm.role).weight = weight;
      return block->forward(hidden, positions).square().mean();
    };
    at::Tensor weight = start.clone().set_requires_grad(true);
    loss(weight).backward();
    const double expected = weight.grad().norm().item<double>();
    const at::Tensor direction = weight.grad() / expected;
    const double step = 0.05;
    const double quotient =
        (loss(start + step * direction).item<double>() - loss(start - step * direction).item<double>()) /
        (2 * step);
    // The cubic term of a step of 0.05 against weights of norm 5 to 8, and float32 sums in the loss.
    EXPECT_NEAR(quotient, expected, 0.01 * expected) << norm.name;
    loss(start);
  }
}

}  // namespace
}  // namespace stbllm
