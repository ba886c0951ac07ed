// Tuning a block: held-out outputs come closer to the dense block's, and the weights stay what the packed
// file can hold.

#include "stbllm/pipeline/tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "stbllm/model/decoder.h"
#include "stbllm/pipeline/pack_weight.h"
#include "stbllm/pipeline/plan_model.h"
#include "stbllm/pipeline/quantize_model.h"
#include "support/calibration_text.h"
#include "support/scratch_directory.h"
#include "support/threads.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

constexpr int64_t kWindows = 16, kHoldout = 4, kSeqlen = 64;

struct Tuned {
  TuneReport report;
  QuantizedBlock quantized;
  at::Tensor expected;  ///< outputs of the dense block
};

Recipe tuned_recipe(const std::string& preset) {
  Recipe recipe = Recipe::load(preset);
  recipe.tune_epochs = 1;
  return recipe;
}

/// Quantizes and tunes block 0 of a tiny model on hidden states of its own embedding.
Tuned tune_first_block(const test::TinyModel& model, const Recipe& recipe) {
  const at::NoGradGuard no_grad;
  const test::ScratchDirectory scratch;
  test::write_checkpoint(scratch.path(), model);
  const Checkpoint checkpoint = Checkpoint::open(scratch.path());
  const Decoder decoder = Decoder::from_checkpoint(checkpoint);
  const Calibration calibration = make_calibration(checkpoint, test::write_calibration_text(scratch.path()),
                                                   kWindows, 0, kSeqlen, /*seed=*/0);
  const at::Tensor ids = ids_of(calibration.windows);
  const at::Tensor hidden = decoder.embed(ids).to(at::kFloat);

  Tuned tuned;
  const auto block = decoder.block(0);
  tuned.expected = run_block(*block, decoder.spec(), hidden);
  tuned.quantized = quantize_block(*block, decoder.spec(), hidden, kHoldout, recipe,
                                   uniform_plan(decoder.spec(), recipe), [](const LinearResult&) {});
  const auto dense_block = decoder.block(0);
  tuned.report =
      tune_block(*dense_block, decoder.spec(), tuned.quantized, hidden, tuned.expected, kHoldout, recipe);
  return tuned;
}

TEST(TuneBlock, BringsHeldOutOutputsCloser) {
  for (const auto& model : {test::tiny_llama(), test::tiny_qwen3(), test::tiny_opt()}) {
    const Tuned tuned = tune_first_block(model, tuned_recipe("stbllm"));
    EXPECT_GT(tuned.report.loss_before, 0);
    EXPECT_LE(tuned.report.loss_after, tuned.report.loss_before);
  }
}

TEST(TuneBlock, TrainsEveryNorm) {
  const test::TinyModel model = test::tiny_qwen3();
  Recipe recipe = tuned_recipe("stbllm-1bit");
  recipe.tune_epochs = 40;  // enough that one of them is better than none and is written back
  const Tuned tuned = tune_first_block(model, recipe);
  ASSERT_GT(tuned.report.epochs, 0);
  for (const NormSpec& norm : ModelSpec::from_config(model.config).norms(0))
    for (const TensorSpec& tensor : norm.tensors) {
      const std::vector<float> before = test::tensor_values(tensor.name, tensor.shape, model.seed);
      const at::Tensor& after = tuned.quantized.tensors.at(tensor.name);
      EXPECT_EQ(after.sizes(), at::IntArrayRef(tensor.shape));
      EXPECT_FALSE(after.equal(at::tensor(before))) << tensor.name;
    }
}

TEST(TuneBlock, LowersTheLossWithMoreEpochs) {
  Recipe recipe = tuned_recipe("stbllm-1bit");
  recipe.tune_epochs = 40;  // of two steps each
  const Tuned tuned = tune_first_block(test::tiny_llama(), recipe);
  EXPECT_GT(tuned.report.epochs, 0);
  EXPECT_LT(tuned.report.loss_after, 0.98 * tuned.report.loss_before);  // it does learn, not just wobble
}

TEST(TuneBlock, KeepsExactlyNOfEveryGroup) {
  Recipe recipe = tuned_recipe("stbllm-1bit");
  recipe.tune_epochs = 3;
  for (const auto& [name, weight] : tune_first_block(test::tiny_llama(), recipe).quantized.linears) {
    const at::Tensor groups = weight.symbols.reshape({weight.rows(), -1, recipe.nm.group});
    EXPECT_TRUE(groups.ne(0).sum(-1).eq(recipe.nm.keep).all().item<bool>()) << name;
    EXPECT_TRUE(unpack_dense(pack_weight(weight, name)).equal(weight.to_dense())) << name;
  }
}

TEST(TuneBlock, LeavesCodesAloneWithoutACodeRate) {
  Recipe recipe = tuned_recipe("stbllm");
  recipe.tune_code_lr = 0;
  EXPECT_EQ(tune_first_block(test::tiny_llama(), recipe).report.changed, 0);
}

TEST(TuneBlock, DoesNotDependOnThreads) {
  const Recipe recipe = tuned_recipe("stbllm");
  std::vector<Tuned> runs;
  for (const int threads : {1, 2}) {
    const test::Threads scope(threads);
    runs.push_back(tune_first_block(test::tiny_opt(), recipe));
  }
  EXPECT_EQ(runs[0].report.loss_after, runs[1].report.loss_after);
  for (const auto& [name, weight] : runs[0].quantized.linears)
    EXPECT_TRUE(weight.to_dense().equal(runs[1].quantized.linears.at(name).to_dense())) << name;
  for (const auto& [name, tensor] : runs[0].quantized.tensors)
    EXPECT_TRUE(tensor.equal(runs[1].quantized.tensors.at(name))) << name;
}

}  // namespace
}  // namespace stbllm
