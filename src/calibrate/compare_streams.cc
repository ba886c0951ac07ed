#include "stbllm/calibrate/compare_streams.h"

#include <ATen/ATen.h>

namespace stbllm {
namespace {

/// Sums over tokens, on the device of the hidden states.
struct Comparison {
  at::Tensor cosine, error;  // float64
  int64_t tokens = 0;

  explicit Comparison(at::Device device)
      : cosine(at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(device))),
        error(at::zeros_like(cosine)) {}

  /// own, dense: (seqlen, hidden) float32.
  void add(const at::Tensor& own, const at::Tensor& dense) {
    constexpr double kSmallestNorm = 1e-30;  // of a token whose hidden states are zero
    const auto sum = [](const at::Tensor& x) { return x.sum(0, false, at::kDouble); };
    const at::Tensor norm_sq = dense.square().sum(1).clamp_min(kSmallestNorm);
    const at::Tensor own_sq = own.square().sum(1).clamp_min(kSmallestNorm);
    cosine += sum((own * dense).sum(1) / (norm_sq * own_sq).sqrt());
    error += sum((own - dense).square().sum(1) / norm_sq);
    tokens += own.size(0);
  }
};

}  // namespace

BlockResult compare_streams(const HiddenStream& own, const HiddenStream& dense, const ProcessGroup& group) {
  Comparison sums(own.device());
  for (int64_t w = 0; w < own.windows() - own.extra(); ++w)
    sums.add(own.read(own.extra() + w, 1)[0].to(at::kFloat),
             dense.read(dense.extra() + w, 1)[0].to(at::kFloat));
  const double tokens = group.all_reduce(static_cast<double>(sums.tokens));
  const double cosine = group.all_reduce(sums.cosine.item<double>()),
               error = group.all_reduce(sums.error.item<double>());
  return {.cosine = cosine / tokens, .relative_error = error / tokens, .tune = {}};
}

double relative_hidden_error(const at::Tensor& own, const at::Tensor& dense) {
  Comparison sums(own.device());
  for (int64_t w = 0; w < own.size(0); ++w) sums.add(own[w].to(at::kFloat), dense[w].to(at::kFloat));
  return sums.error.item<double>() / static_cast<double>(sums.tokens);
}

}  // namespace stbllm
