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
  at::Tensor x = inputs.to(at::kFloat);
  if (token_weights_) {
    const at::Tensor norm = x.norm(2, -1).clamp_min(1e-12);  // (..., tokens of a window)
    // Of each window alone, so that a window counts the same whatever the batch around it.
    const at::Tensor median = std::get<0>(norm.median(-1, /*keepdim=*/true));
    x = x * (3 * median / norm).clamp_max(1.0).sqrt().unsqueeze(-1);
  }
  x = x.reshape({-1, x.size(-1)});
  const int64_t tokens = x.size(0);
  if (tokens_ + holdout_tokens_ == 0) sum_ = sum_.to(x.device());
  if (holdout && !holdout_sum_.defined()) holdout_sum_ = at::zeros_like(sum_);
  at::Tensor& sum = holdout ? holdout_sum_ : sum_;
  // H is symmetric: panels of columns on and above the diagonal are enough.
  const int64_t cols = x.size(1);
  for (int64_t first = 0; first < cols; first += kPanel) {
    const int64_t width = std::min(kPanel, cols - first);
    sum.narrow(0, first, width)
        .narrow(1, first, cols - first)
        .addmm_(x.narrow(1, first, width).t(), x.narrow(1, first, cols - first));
  }
  (holdout ? holdout_tokens_ : tokens_) += tokens;
}

void StatsAccumulator::merge(const std::function<void(at::Tensor&)>& add_up) {
  at::Tensor tokens = at::tensor({tokens_, holdout_tokens_}, at::kLong);
  add_up(tokens);
  tokens_ = tokens[0].item<int64_t>();
  holdout_tokens_ = tokens[1].item<int64_t>();
  const auto add_in_host_memory = [&](at::Tensor& sum) {
    const at::Device device = sum.device();
    sum = sum.cpu();
    add_up(sum);
    sum = sum.to(device);
  };
  add_in_host_memory(sum_);
  if (holdout_tokens_ == 0) return;
  if (!holdout_sum_.defined()) holdout_sum_ = at::zeros_like(sum_);  // held-out windows are elsewhere
  add_in_host_memory(holdout_sum_);
}

InputStats StatsAccumulator::finish() {
  STBLLM_CHECK(tokens_ > 0, "no calibration token was seen");
  InputStats stats;
  stats.hessian = mirrored(sum_, 2.0 / static_cast<double>(tokens_));
  if (holdout_tokens_ > 0)
    stats.holdout_hessian = mirrored(holdout_sum_, 2.0 / static_cast<double>(holdout_tokens_));
  stats.tokens = tokens_;
  return stats;
}

}  // namespace stbllm
