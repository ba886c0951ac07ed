#include "stbllm/pipeline/tune.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "stbllm/base/bits.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/pipeline/spill.h"
#include "stbllm/pipeline/trained_block.h"

namespace stbllm {

TuneReport tune_block(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized,
                      const at::Tensor& inputs, const at::Tensor& targets, int64_t holdout,
                      const Recipe& recipe) {
  const at::NoGradGuard no_grad;
  const int64_t windows = inputs.size(0), seqlen = inputs.size(1), training = windows - holdout;
  TrainedBlock trained(block, spec, quantized, /*train_codes=*/recipe.tune_code_lr > 0);
  const Positions positions(spec, 0, seqlen, at::kFloat, at::kCPU);
  at::Tensor token_weight, energy;
  {
    const at::Tensor norm = at::empty({windows, seqlen}, at::kFloat), change = at::empty_like(norm);
    for (int64_t w = 0; w < windows; ++w) {  // one at a time: these may be most of what is in memory
      const at::Tensor target = targets[w].to(at::kFloat);
      norm[w].copy_(target.norm(2, -1).clamp_min(1e-12));
      change[w].copy_((target - inputs[w]).square().sum(-1));
      release_spilled(targets[w]);
      release_spilled(inputs[w]);
    }
    token_weight = (3 * norm.median() / norm).clamp_max(1.0).square();
    // Window by window: one long sum would be cut by threads.
    energy = ((change * token_weight).sum(1).sum() / static_cast<double>(change.numel())).clamp_min(1e-20);
  }
  const auto loss_of = [&](int64_t first, int64_t count) {
    const at::Tensor x = inputs.narrow(0, first, count), y = targets.narrow(0, first, count);
    const at::Tensor loss = ((block.forward(x.to(at::kFloat), positions) - y).square().sum(-1) *
                             token_weight.narrow(0, first, count))
                                .mean() /
                            energy;
    release_spilled(x);
    release_spilled(y);
    return loss;
  };
  const int64_t step = windows_per_step(seqlen);
  const auto judge = [&] {
    return held_out_mean(windows, holdout, step,
                         [&](int64_t first, int64_t count) { return loss_of(first, count).item<double>(); });
  };

  TuneReport report;
  report.loss_before = report.loss_after = judge();
  const int64_t steps_per_epoch = ceil_div(training, step),
                total_steps = steps_per_epoch * recipe.tune_epochs;
  int64_t done = 0;
  for (int epoch = 1; epoch <= recipe.tune_epochs; ++epoch) {
    for (int64_t first = 0; first < training; first += step, ++done) {
      check_interrupt();
      {
        const at::AutoGradMode with_grad(true);
        loss_of(first, std::min(step, training - first)).backward();
      }
      trained.step(decayed({recipe.tune_lr, recipe.tune_code_lr}, done, total_steps));
    }
    const double loss = judge();
    if (loss < report.loss_after) {
      report.loss_after = loss;
      report.epochs = epoch;
      report.changed = trained.write_back();
    }
  }
  return report;
}

}  // namespace stbllm
