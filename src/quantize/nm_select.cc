#include "stbllm/quantize/nm_select.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>

namespace stbllm {

at::Tensor importance(const at::Tensor& weight_t, const at::Tensor& norm_sq, const at::Tensor& inverse_diag, Importance metric) {
  const at::Tensor magnitude = weight_t.abs();
  // Row- plus column-normalised magnitude; an all-zero row or column counts as zero.
  const auto relative = [&] {
    return magnitude / magnitude.sum(0, /*keepdim=*/true).clamp_min(1e-30) +
           magnitude / magnitude.sum(1, /*keepdim=*/true).clamp_min(1e-30);
  };
  switch (metric) {
    case Importance::kMagnitude:
      return magnitude;
    case Importance::kWanda:
      return magnitude * norm_sq.sqrt().unsqueeze(1);
    case Importance::kRia:
      return relative() * norm_sq.sqrt().sqrt().unsqueeze(1);
    case Importance::kSi: {
      const at::Tensor mu = relative();
      // Sums go column by column first: a reduction over all elements would be cut differently by another number of threads.
      const double count = static_cast<double>(mu.numel());
      const at::Tensor mean = mu.sum(1, false, at::kDouble).sum() / count;
      const at::Tensor deviation = (mu - mean).square().sum(1, false, at::kDouble).sum().div(count - 1).sqrt();
      return ((mu - mean) / (deviation + 1e-12)).to(at::kFloat) * norm_sq.sqrt().unsqueeze(1);
    }
    case Importance::kObs:
      return (weight_t / inverse_diag.unsqueeze(1)).square();
  }
  return magnitude;
}

at::Tensor nm_mask(const at::Tensor& score_t, NmPattern nm) {
  const int64_t cols = score_t.size(0), rows = score_t.size(1);
  at::Tensor mask = at::zeros({cols, rows}, at::kByte);
  const float* score = score_t.data_ptr<float>();
  uint8_t* kept = mask.data_ptr<uint8_t>();
  const int64_t groups = (cols + nm.group - 1) / nm.group;
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * nm.group;
      const int width = static_cast<int>(std::min<int64_t>(nm.group, cols - first));
      const int keep = std::min(nm.keep, width);
      for (int64_t row = 0; row < rows; ++row) {
        std::array<int, 16> order;
        for (int i = 0; i < width; ++i) order[i] = i;
        std::partial_sort(order.begin(), order.begin() + keep, order.begin() + width, [&](int a, int b) {
          const float x = score[(first + a) * rows + row], y = score[(first + b) * rows + row];
          return x > y || (x == y && a < b);
        });
        for (int i = 0; i < keep; ++i) kept[(first + order[i]) * rows + row] = 1;
      }
    }
  });
  return mask;
}

}  // namespace stbllm
