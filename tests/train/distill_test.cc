// Distillation: the packed model's logits come closer to the dense model's, and what is written is what was
// trained.

#include "stbllm/train/distill.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/model/load_model.h"
#include "stbllm/plan/plan.h"
#include "stbllm/run/quantize_model.h"
#include "stbllm/run/work_directory.h"
#include "support/calibration_text.h"
#include "support/processor.h"
#include "support/recipes.h"
#include "support/scratch_directory.h"
#include "support/threads.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

constexpr int64_t kWindows = 16, kHoldout = 2, kSeqlen = 48;

Recipe distilled_recipe(double code_lr) {
  Recipe recipe = Recipe::load("stbllm-1bit");
  recipe.training.distill = {.epochs = 16, .lr = 0.02, .code_lr = code_lr};  // of two steps each
  test::start_plainly(recipe);
  return recipe;
}

struct Distilled {
  int interrupted = 0;
  DistillReport report;
  std::vector<QuantizedBlock> blocks;
};

/// Quantizes all blocks of a tiny model and distils it. Of `interruptions` the first comes before the first
/// step, the others some milliseconds after a start, wherever that is.
Distilled run(const test::TinyModel& model, const Recipe& recipe, int interruptions = 0) {
  const at::NoGradGuard no_grad;
  const test::ScratchDirectory scratch;
  test::write_checkpoint(scratch.path(), model);
  const Checkpoint checkpoint = Checkpoint::open(scratch.path());
  Decoder student = Decoder::from_checkpoint(checkpoint);
  const Decoder teacher = Decoder::from_checkpoint(checkpoint);
  const ModelSpec& spec = student.spec();
  const Calibration calibration = make_calibration(checkpoint, test::write_calibration_text(scratch.path()),
                                                   kWindows, 0, kSeqlen, /*seed=*/0);
  Distilled result;
  HiddenStream stream(student, ids_of(calibration.windows), {.holdout = kHoldout});
  HiddenStream dense_stream = stream.copy();
  const Plan plan = uniform_plan(spec, test::scheme_of(recipe));
  for (int64_t i = 0; i < spec.layers; ++i) {
    const auto block = student.block(i), dense_block = teacher.block(i);
    result.blocks.push_back(quantize_block(
        *block, {.quantized = stream, .dense = &dense_stream, .dense_block = dense_block.get()},
        recipe.method, plan, [](const LinearResult&) {}));
  }
  const WorkDirectory work(scratch / "packed", {}, /*resume=*/false, /*force=*/false);
  const std::vector<QuantizedBlock> quantized = result.blocks;
  for (;; --interruptions) {
    result.blocks = quantized;
    Decoder fresh = Decoder::from_checkpoint(checkpoint);  // as another process would have it
    std::jthread interrupter;
    if (result.interrupted == 0 && interruptions > 0)
      request_interrupt();
    else if (interruptions > 0)
      interrupter = std::jthread([interruptions] {
        std::this_thread::sleep_for(std::chrono::milliseconds(7 * interruptions));
        request_interrupt();
      });
    try {
      result.report = distill({.student = fresh,
                               .teacher = teacher,
                               .teacher_states = dense_stream,
                               .blocks = result.blocks,
                               .stage = *recipe.training.distill},
                              *work.training_store({{"seed", 0}}));
      break;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInterrupted);
      ++result.interrupted;
    }
  }
  try {
    check_interrupt();  // one that came too late
  } catch (const Error&) {
  }
  return result;
}

class Distill : public test::InBothProducts {};
STBLLM_INSTANTIATE_PRODUCTS(Distill);

/// Logits of the student are off by a good part of their size, those of either model by parts in 2^8 where
/// products are bfloat16: that moves the divergence by much less than the hundredth that learning has to
/// bring.
TEST_P(Distill, BringsHeldOutLogitsCloser) {
  for (const auto& model : {test::tiny_llama(), test::tiny_opt()})
    for (const double code_lr : {0.0, 0.004}) {
      SCOPED_TRACE(fmt::format("{}, codes at {}", model.config["model_type"].get<std::string>(), code_lr));
      const DistillReport report = run(model, distilled_recipe(code_lr)).report;
      EXPECT_GT(report.epochs, 0);
      EXPECT_LT(report.divergence_after, 0.99 * report.divergence_before);
      EXPECT_EQ(report.changed > 0, code_lr > 0);
    }
}

TEST_P(Distill, KeepsExactlyNOfEveryGroup) {
  const Recipe recipe = distilled_recipe(0.01);
  const Distilled distilled = run(test::tiny_llama(), recipe);
  ASSERT_GT(distilled.report.changed, 0);
  for (const QuantizedBlock& block : distilled.blocks)
    for (const auto& [name, weight] : block.linears) {
      const at::Tensor groups = weight.symbols.reshape({weight.rows(), -1, test::scheme_of(recipe).nm.group});
      EXPECT_TRUE(groups.ne(0).sum(-1).eq(test::scheme_of(recipe).nm.keep).all().item<bool>()) << name;
    }
}

TEST_P(Distill, DoesNotDependOnThreads) {
  Recipe recipe = distilled_recipe(0.004);
  recipe.training.distill->epochs = 2;
  std::vector<Distilled> runs;
  for (const int threads : {1, 2}) {
    const test::Threads scope(threads);
    runs.push_back(run(test::tiny_llama(), recipe));
  }
  ASSERT_GT(runs[0].report.epochs, 0);  // something was written back
  EXPECT_EQ(runs[0].report.divergence_after, runs[1].report.divergence_after);
  for (size_t i = 0; i < runs[0].blocks.size(); ++i)
    for (const auto& [name, weight] : runs[0].blocks[i].linears)
      EXPECT_TRUE(weight.to_dense().equal(runs[1].blocks[i].linears.at(name).to_dense())) << name;
}

TEST_P(Distill, GoesOnToTheSameResultAfterInterruptions) {
  const Recipe recipe = distilled_recipe(0.004);
  const Distilled undisturbed = run(test::tiny_llama(), recipe),
                  disturbed = run(test::tiny_llama(), recipe, /*interruptions=*/4);
  EXPECT_GT(disturbed.interrupted, 0);
  ASSERT_GT(undisturbed.report.epochs, 0);
  EXPECT_EQ(undisturbed.report.divergence_after, disturbed.report.divergence_after);
  EXPECT_EQ(undisturbed.report.epochs, disturbed.report.epochs);
  EXPECT_EQ(undisturbed.report.changed, disturbed.report.changed);
  for (size_t i = 0; i < undisturbed.blocks.size(); ++i) {
    for (const auto& [name, weight] : undisturbed.blocks[i].linears)
      EXPECT_TRUE(weight.to_dense().equal(disturbed.blocks[i].linears.at(name).to_dense())) << name;
    for (const auto& [name, tensor] : undisturbed.blocks[i].tensors)
      EXPECT_TRUE(tensor.equal(disturbed.blocks[i].tensors.at(name))) << name;
  }
}

/// Windows for distillation only leave statistics, tuning and held-out text as they are.
TEST_P(Distill, MayLearnFromMoreWindowsThanTheBlocksSee) {
  const test::ScratchDirectory scratch;
  test::write_checkpoint(scratch / "checkpoint", test::tiny_llama());
  const Checkpoint checkpoint = Checkpoint::open(scratch / "checkpoint");
  const std::string text = test::write_calibration_text(scratch.path());
  Recipe recipe = distilled_recipe(0.004);
  recipe.training.tune = TrainingPolicy::kDefaultTune;
  recipe.training.distill->epochs = 1;
  std::vector<QuantizeResult> results;
  for (const int64_t more : {0, 24}) {
    QuantizeOptions options;
    options.output = scratch / fmt::format("packed-{}.safetensors", more);
    results.push_back(quantize_model(checkpoint,
                                     make_calibration(checkpoint, text, kWindows, more, kSeqlen, /*seed=*/0),
                                     recipe, options));
  }
  for (size_t i = 0; i < results[0].linears.size(); ++i)
    EXPECT_EQ(results[0].linears[i].report.output_error, results[1].linears[i].report.output_error)
        << results[0].linears[i].name;
  for (size_t i = 0; i < results[0].blocks.size(); ++i)
    EXPECT_EQ(results[0].blocks[i].tune->loss_after, results[1].blocks[i].tune->loss_after);
  EXPECT_EQ(results[0].distill->divergence_before, results[1].distill->divergence_before);
  EXPECT_LT(results[1].distill->divergence_after, results[0].distill->divergence_after);
}

/// The whole way through a file, which quantize_model verifies against float32 weights by itself.
TEST_P(Distill, ReachesThePackedFile) {
  const test::ScratchDirectory scratch;
  test::write_checkpoint(scratch / "checkpoint", test::tiny_llama());
  const Checkpoint checkpoint = Checkpoint::open(scratch / "checkpoint");
  const Calibration calibration = make_calibration(checkpoint, test::write_calibration_text(scratch.path()),
                                                   kWindows, 0, kSeqlen, /*seed=*/0);
  QuantizeOptions options;
  options.output = scratch / "packed.safetensors";
  const QuantizeResult result = quantize_model(checkpoint, calibration, distilled_recipe(0.004), options);
  ASSERT_TRUE(result.distill.has_value());
  EXPECT_LT(result.distill->divergence_after, result.distill->divergence_before);

  const LoadedModel dense = load_model((scratch / "checkpoint").string(), "cpu", "float32"),
                    packed = load_model(options.output.string(), "cpu", "float32");
  const Windows held_out(calibration.windows.end() - calibration.holdout, calibration.windows.end());
  double divergence = 0;
  for (const auto& window : held_out) {
    const auto log_probabilities = [&](const Decoder& decoder) {
      return at::log_softmax(decoder.logits(final_hidden_states(decoder, std::span(&window, 1))), -1);
    };
    const at::Tensor p = log_probabilities(dense.decoder), q = log_probabilities(packed.decoder);
    divergence += (p.exp() * (p - q)).sum(-1).mean().item<double>() / static_cast<double>(held_out.size());
  }
  // Training multiplies in bfloat16, which moves logits by parts in 2^8.
  EXPECT_NEAR(divergence, result.distill->divergence_after, 0.1 * result.distill->divergence_after);
}

}  // namespace
}  // namespace stbllm
