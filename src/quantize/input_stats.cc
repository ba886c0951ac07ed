#include "stbllm/quantize/input_stats.h"

#include "stbllm/base/error.h"

namespace stbllm {

StatsAccumulator::StatsAccumulator(int64_t cols, bool token_weights)
    : sum_(at::zeros({cols, cols}, at::kFloat)), token_weights_(token_weights) {}

void StatsAccumulator::add(const at::Tensor& inputs, bool holdout) {
  at::Tensor x = inputs.reshape({-1, inputs.size(-1)}).to(at::kFloat);
  const int64_t tokens = x.size(0);
  if (token_weights_) {
    const at::Tensor norm = x.norm(2, 1).clamp_min(1e-12);
    const at::Tensor weight = (3 * norm.median() / norm).clamp_max(1.0);
    x = x * weight.sqrt().unsqueeze(1);
  }
  if (holdout && !holdout_sum_.defined()) holdout_sum_ = at::zeros_like(sum_);
  at::Tensor& sum = holdout ? holdout_sum_ : sum_;
  sum.addmm_(x.t(), x);
  (holdout ? holdout_tokens_ : tokens_) += tokens;
}

InputStats StatsAccumulator::finish() {
  STBLLM_CHECK(tokens_ > 0, "no calibration token was seen");
  InputStats stats;
  stats.hessian = sum_.mul_(2.0 / static_cast<double>(tokens_));
  if (holdout_tokens_ > 0) stats.holdout_hessian = holdout_sum_.mul_(2.0 / static_cast<double>(holdout_tokens_));
  stats.tokens = tokens_;
  return stats;
}

}  // namespace stbllm
