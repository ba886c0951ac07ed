#include "stbllm/quantize/input_stats.h"

#include <algorithm>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

constexpr int64_t kPanel = 512;  ///< wide enough for full-speed products

/// What was summed up on and above the diagonal, times `factor`, as a symmetric matrix.
at::Tensor mirrored(const at::Tensor& sum, double factor) {
  const at::Tensor upper = sum.triu() * factor;
  return upper + upper.triu(1).t();
}

}  // namespace

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
  // H is symmetric: panels of columns on and above the diagonal are enough.
  const int64_t cols = x.size(1);
  for (int64_t first = 0; first < cols; first += kPanel) {
    const int64_t width = std::min(kPanel, cols - first);
    sum.narrow(0, first, width).narrow(1, first, cols - first).addmm_(x.narrow(1, first, width).t(), x.narrow(1, first, cols - first));
  }
  (holdout ? holdout_tokens_ : tokens_) += tokens;
}

InputStats StatsAccumulator::finish() {
  STBLLM_CHECK(tokens_ > 0, "no calibration token was seen");
  InputStats stats;
  stats.hessian = mirrored(sum_, 2.0 / static_cast<double>(tokens_));
  if (holdout_tokens_ > 0) stats.holdout_hessian = mirrored(holdout_sum_, 2.0 / static_cast<double>(holdout_tokens_));
  stats.tokens = tokens_;
  return stats;
}

}  // namespace stbllm
