#include "stbllm/train/tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <array>

#include "stbllm/base/bits.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/train/trained_block.h"

namespace stbllm {
namespace {

/// What a step lowers: the distance of the block's outputs from the targets, weighted by token, in units of
/// what the block adds to its inputs.
class Reconstruction {
 public:
  Reconstruction(const DecoderBlock& block, const ModelSpec& spec, const HiddenStream& inputs,
                 const HiddenStream& targets)
      : block_(block),
        inputs_(inputs),
        targets_(targets),
        positions_(spec, 0, inputs.seqlen(), fast_product_dtype(inputs.device()), inputs.device()) {
    const std::array<int64_t, 2> sizes = {inputs.windows(), inputs.seqlen()};
    const at::Tensor norm = at::empty(sizes, at::TensorOptions().dtype(at::kFloat).device(inputs.device())),
                     change = at::empty_like(norm);
    for (int64_t w = 0; w < inputs.windows(); ++w) {  // one at a time: these may be most of what is in memory
      const at::Tensor target = read(targets, w, 1)[0];
      norm[w].copy_(target.norm(2, -1).clamp_min(kSmallestNorm));
      change[w].copy_((target - read(inputs, w, 1)[0]).square().sum(-1));
    }
    token_weight_ = (3 * norm.median() / norm).clamp_max(1.0).square();
    // Window by window: one long sum would be cut by threads.
    const at::Tensor weighted = (change * token_weight_).sum(1).sum();
    energy_ = (weighted / static_cast<double>(change.numel())).clamp_min(kSmallestEnergy);
  }

  /// Mean over the tokens of `count` windows from `first` on.
  at::Tensor loss(int64_t first, int64_t count) const {
    const at::Tensor outputs = block_.forward(read(inputs_, first, count), positions_);
    const at::Tensor distance = (outputs - read(targets_, first, count)).square().sum(-1);
    return (distance * token_weight_.narrow(0, first, count)).mean() / energy_;
  }

 private:
  /// Where hidden states are zero there is nothing to divide by.
  static constexpr double kSmallestNorm = 1e-12, kSmallestEnergy = 1e-20;

  /// Windows that are not extra, counted from the first of these.
  static at::Tensor read(const HiddenStream& stream, int64_t first, int64_t count) {
    return stream.read(stream.extra() + first, count);
  }

  const DecoderBlock& block_;
  const HiddenStream &inputs_, &targets_;
  const Positions positions_;  // in the dtype of products, which is what the branches compute in
  at::Tensor token_weight_;    // (windows, seqlen): w_t^2
  at::Tensor energy_;          // scalar
};

}  // namespace

TuneReport tune_block(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized,
                      const HiddenStream& inputs, const HiddenStream& targets, const TrainingStage& stage) {
  const at::NoGradGuard no_grad;
  STBLLM_CHECK(inputs.extra() == 0 && targets.windows() - targets.extra() == inputs.windows(),
               "{} windows of inputs, {} of targets", inputs.windows(), targets.windows() - targets.extra());
  const int64_t windows = inputs.windows(), holdout = inputs.holdout(), training = windows - holdout;
  const int64_t step = windows_per_step(inputs.seqlen());
  const Reconstruction reconstruction(block, spec, inputs, targets);
  TrainedBlock trained(block, spec, quantized, /*train_codes=*/stage.code_lr > 0);
  const auto judge = [&] {
    return held_out_mean(windows, holdout, step, [&](int64_t first, int64_t count) {
      return reconstruction.loss(first, count).item<double>();
    });
  };

  TuneReport report;
  report.loss_before = report.loss_after = judge();
  const int64_t total_steps = ceil_div(training, step) * stage.epochs;
  int64_t done = 0;
  double seconds = 0;
  for (int epoch = 1; epoch <= stage.epochs; ++epoch) {
    const double started = seconds_now();
    for (int64_t first = 0; first < training; first += step, ++done) {
      check_interrupt();
      {
        const at::AutoGradMode with_grad(true);
        reconstruction.loss(first, std::min(step, training - first)).backward();
      }
      trained.step(decayed({.gains = stage.lr, .codes = stage.code_lr}, done, total_steps));
    }
    at::zeros({1}, at::TensorOptions().device(inputs.device())).item();  // a device is done then
    seconds += seconds_now() - started;
    const double loss = judge();
    if (loss < report.loss_after) {
      report.loss_after = loss;
      report.epochs = epoch;
      report.changed = trained.write_back();
    }
  }
  if (seconds > 0)
    report.tokens_per_second = static_cast<double>(training * inputs.seqlen() * stage.epochs) / seconds;
  return report;
}

}  // namespace stbllm
