// Tuning a block: held-out outputs come closer to the dense block's, and the weights stay what the packed
// file can hold.

#include "stbllm/train/tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "stbllm/calibrate/calibration.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/model/decoder.h"
#include "stbllm/plan/plan.h"
#include "support/calibration_text.h"
#include "support/processor.h"
#include "support/recipes.h"
#include "support/scratch_directory.h"
#include "support/threads.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

constexpr int64_t kWindows = 16, kHoldout = 4, kSeqlen = 64;

/// What becomes of block 0 of a tiny model, on hidden states of its own embedding.
struct Tuned {
  TuneReport report;
  QuantizedBlock untuned, quantized;  ///< before and after
  double held_out_untuned = 0;  ///< mean square distance of held-out outputs from the dense block's, float32
  double held_out = 0;
};

/// Epochs are of two steps here: 40 of them suffice to learn something, whatever the seed.
constexpr int kEpochs = 40;

Recipe tuned_recipe(const std::string& preset, int epochs = kEpochs) {
  Recipe recipe = Recipe::load(preset);
  recipe.training.tune = TrainingPolicy::kDefaultTune;
  recipe.training.tune->epochs = epochs;
  test::start_plainly(recipe);
  return recipe;
}

Tuned tune_first_block(const test::TinyModel& model, const Recipe& recipe) {
  const at::NoGradGuard no_grad;
  const test::ScratchDirectory scratch;
  test::write_checkpoint(scratch.path(), model);
  const Checkpoint checkpoint = Checkpoint::open(scratch.path());
  const Decoder decoder = Decoder::from_checkpoint(checkpoint);
  const ModelSpec& spec = decoder.spec();
  const Calibration calibration = make_calibration(checkpoint, test::write_calibration_text(scratch.path()),
                                                   kWindows, 0, kSeqlen, /*seed=*/0);
  const HiddenStream inputs(decoder, ids_of(calibration.windows), {.holdout = kHoldout});
  HiddenStream targets = inputs.copy(), passed = inputs.copy();

  Tuned tuned;
  const auto block = decoder.block(0), dense_block = decoder.block(0);
  const auto held_out_error = [&](const QuantizedBlock& quantized) {
    const auto own = decoder.block(0);
    install(quantized, *own, spec);
    const at::Tensor error = inputs.outputs(*own) - targets.states();
    return error.narrow(0, kWindows - kHoldout, kHoldout).square().mean().item<double>();
  };
  tuned.untuned =
      quantize_block(*block, {.quantized = passed, .dense = &targets, .dense_block = dense_block.get()},
                     recipe.method, uniform_plan(spec, test::scheme_of(recipe)), [](const LinearResult&) {});
  tuned.quantized = tuned.untuned;
  tuned.report = tune_block(*decoder.block(0), spec, tuned.quantized, inputs, targets, *recipe.training.tune);
  tuned.held_out_untuned = held_out_error(tuned.untuned);
  tuned.held_out = held_out_error(tuned.quantized);
  return tuned;
}

class TuneBlock : public test::InBothProducts {};
STBLLM_INSTANTIATE_PRODUCTS(TuneBlock);

/// Judged twice: by the report, and by what was written back, which is run in float32 here. Rounding of
/// products to bfloat16 adds parts in 2^8 of the outputs to errors of a tenth of them or more, which moves a
/// mean square by less than (2^-8 / 0.1)^2 = 0.15 %; five times as much is what learning has to bring.
TEST_P(TuneBlock, BringsHeldOutOutputsCloser) {
  for (const auto& model : {test::tiny_llama(), test::tiny_qwen3(), test::tiny_opt()})
    for (const char* preset : {"stbllm", "stbllm-1bit"}) {
      SCOPED_TRACE(model.config["model_type"].get<std::string>() + " by " + preset);
      const Tuned tuned = tune_first_block(model, tuned_recipe(preset));
      EXPECT_GT(tuned.report.epochs, 0);
      EXPECT_LT(tuned.report.loss_after, 0.9925 * tuned.report.loss_before);
      EXPECT_LT(tuned.held_out, 0.9925 * tuned.held_out_untuned);
    }
}

TEST_P(TuneBlock, TrainsEveryNorm) {
  const test::TinyModel model = test::tiny_qwen3();
  const Tuned tuned = tune_first_block(model, tuned_recipe("stbllm"));
  ASSERT_GT(tuned.report.epochs, 0);
  for (const NormSpec& norm : ModelSpec::from_config(model.config).norms(0))
    for (const TensorSpec& tensor : norm.tensors) {
      const std::vector<float> before = test::tensor_values(tensor.name, tensor.shape, model.seed);
      const at::Tensor& after = tuned.quantized.tensors.at(tensor.name);
      EXPECT_EQ(after.sizes(), at::IntArrayRef(tensor.shape));
      EXPECT_FALSE(after.equal(at::tensor(before))) << tensor.name;
    }
}

TEST_P(TuneBlock, LeavesTheBlockAloneWhenNoEpochBringsItCloser) {
  Recipe recipe = tuned_recipe("stbllm", 1);
  recipe.training.tune->lr = recipe.training.tune->code_lr = 20;  // makes scales ten times larger or smaller
  const Tuned tuned = tune_first_block(test::tiny_llama(), recipe);
  EXPECT_EQ(tuned.report.epochs, 0);
  EXPECT_EQ(tuned.report.loss_after, tuned.report.loss_before);
  for (const auto& [name, weight] : tuned.quantized.linears)
    EXPECT_TRUE(weight.to_dense().equal(tuned.untuned.linears.at(name).to_dense())) << name;
}

TEST_P(TuneBlock, KeepsExactlyNOfEveryGroup) {
  const Recipe recipe = tuned_recipe("stbllm-1bit");
  const Tuned tuned = tune_first_block(test::tiny_llama(), recipe);
  ASSERT_GT(tuned.report.changed, 0);
  for (const auto& [name, weight] : tuned.quantized.linears) {
    const at::Tensor groups = weight.symbols.reshape({weight.rows(), -1, test::scheme_of(recipe).nm.group});
    EXPECT_TRUE(groups.ne(0).sum(-1).eq(test::scheme_of(recipe).nm.keep).all().item<bool>()) << name;
    EXPECT_TRUE(unpack_weight(pack_weight(weight, name)).to_dense().equal(weight.to_dense())) << name;
  }
}

TEST_P(TuneBlock, LeavesCodesAloneWithoutACodeRate) {
  Recipe recipe = tuned_recipe("stbllm");
  recipe.training.tune->code_lr = 0;
  const Tuned tuned = tune_first_block(test::tiny_llama(), recipe);
  ASSERT_GT(tuned.report.epochs, 0);
  EXPECT_EQ(tuned.report.changed, 0);
  for (const auto& [name, weight] : tuned.quantized.linears) {
    const BinarizedWeight& before = tuned.untuned.linears.at(name);
    EXPECT_TRUE(weight.symbols.equal(before.symbols)) << name;
    EXPECT_FALSE(weight.to_dense().equal(before.to_dense())) << name;  // but its scales moved
  }
}

TEST_P(TuneBlock, DoesNotDependOnThreads) {
  const Recipe recipe = tuned_recipe("stbllm", 4);
  std::vector<Tuned> runs;
  for (const int threads : {1, 2}) {
    const test::Threads scope(threads);
    runs.push_back(tune_first_block(test::tiny_opt(), recipe));
  }
  ASSERT_GT(runs[0].report.epochs, 0);
  EXPECT_EQ(runs[0].report.loss_after, runs[1].report.loss_after);
  for (const auto& [name, weight] : runs[0].quantized.linears)
    EXPECT_TRUE(weight.to_dense().equal(runs[1].quantized.linears.at(name).to_dense())) << name;
  for (const auto& [name, tensor] : runs[0].quantized.tensors)
    EXPECT_TRUE(tensor.equal(runs[1].quantized.tensors.at(name))) << name;
}

}  // namespace
}  // namespace stbllm
