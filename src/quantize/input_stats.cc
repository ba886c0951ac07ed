#include "stbllm/quantize/input_stats.h"

#include <algorithm>

#include "stbllm/base/error.h"
#include "stbllm/quantize/rounded_products.h"

namespace stbllm {
namespace {

constexpr int64_t kPanel = 512;  ///< wide enough for full-speed products

/// What was summed up on and above the diagonal, times `factor`, as a symmetric matrix.
at::Tensor mirrored(const at::Tensor& sum, double factor) {
  const at::Tensor upper = sum.triu() * factor;
  return upper + upper.triu(1).t();
}

constexpr double kSmallestNorm = 1e-12;  ///< of a token, so that zeros can be divided by it

/// min(1, times * median norm of the window's tokens / norm) of each token, (..., tokens of a window, 1). The
/// median is of each window alone, so that a window counts the same whatever the batch around it.
at::Tensor clipping(const at::Tensor& x, double times) {
  const at::Tensor norm = x.norm(2, -1, /*keepdim=*/true).clamp_min(kSmallestNorm);
  const at::Tensor median = std::get<0>(norm.median(-2, /*keepdim=*/true));
  return (times * median / norm).clamp_max(1.0);
}

}  // namespace

StatsAccumulator::StatsAccumulator(int64_t cols, const StatsOptions& options)
    : cols_(cols), options_(options) {}

void StatsAccumulator::add(const at::Tensor& inputs, bool holdout, const Drift& drift) {
  const RoundedProducts rounded(options_.rounded_products);
  at::Tensor x = inputs.to(at::kFloat), weight;  // weight: the square root of w
  if (options_.token_weights) weight = clipping(x, 3).sqrt();
  const auto weighted = [&](const at::Tensor& values) {
    return (weight.defined() ? values * weight : values).reshape({-1, values.size(-1)});
  };
  x = weighted(x);
  Sum& sums = holdout ? held_out_ : seen_;
  const auto start = [&](at::Tensor& sum, int64_t rows) {
    if (!sum.defined()) sum = at::zeros({rows, cols_}, x.options());
  };
  start(sums.squares, cols_);
  // H is symmetric: panels of columns on and above the diagonal are enough.
  for (int64_t first = 0; first < cols_; first += kPanel) {
    const int64_t width = std::min(kPanel, cols_ - first);
    sums.squares.narrow(0, first, width)
        .narrow(1, first, cols_ - first)
        .addmm_(x.narrow(1, first, width).t(), x.narrow(1, first, cols_ - first));
  }
  const auto add_drift = [&](at::Tensor& sum, const at::Tensor& difference) {
    STBLLM_CHECK(!holdout, "held-out inputs are not compared with the dense model's");
    start(sum, difference.size(-1));
    sum.addmm_(weighted(difference).t(), x);
  };
  if (drift.inputs.defined()) add_drift(input_drift_, drift.inputs.to(at::kFloat));
  if (drift.hidden.defined()) {
    const at::Tensor hidden = drift.hidden.to(at::kFloat);
    add_drift(hidden_drift_, hidden * clipping(hidden, 1));
  }
  sums.tokens += x.size(0);
}

void StatsAccumulator::merge(const std::function<void(at::Tensor&)>& add_up) {
  // Held-out windows may all be elsewhere, but those behind H are in every process.
  at::Tensor tokens = at::tensor({seen_.tokens, held_out_.tokens}, at::kLong);
  add_up(tokens);
  seen_.tokens = tokens[0].item<int64_t>();
  held_out_.tokens = tokens[1].item<int64_t>();
  STBLLM_CHECK(seen_.squares.defined(), "no calibration token was seen");
  const auto add_in_host_memory = [&](at::Tensor& sum) {
    const at::Device device = seen_.squares.device();
    sum = sum.defined() ? sum.cpu() : at::zeros({cols_, cols_}, at::kFloat);
    add_up(sum);
    sum = sum.to(device);
  };
  add_in_host_memory(seen_.squares);
  for (at::Tensor* drift : {&input_drift_, &hidden_drift_})
    if (drift->defined()) add_in_host_memory(*drift);
  if (held_out_.tokens > 0) add_in_host_memory(held_out_.squares);
}

InputStats StatsAccumulator::finish() {
  STBLLM_CHECK(seen_.tokens > 0, "no calibration token was seen");
  InputStats stats;
  const double factor = 2.0 / static_cast<double>(seen_.tokens);
  stats.hessian = mirrored(seen_.squares, factor);
  if (input_drift_.defined()) stats.input_drift = input_drift_.mul_(factor);
  if (hidden_drift_.defined()) stats.hidden_drift = hidden_drift_.mul_(factor);
  stats.tokens = seen_.tokens;
  if (held_out_.tokens > 0)
    stats.holdout_hessian = mirrored(held_out_.squares, 2.0 / static_cast<double>(held_out_.tokens));
  *this = StatsAccumulator(cols_, options_);
  return stats;
}

}  // namespace stbllm
