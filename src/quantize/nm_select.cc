#include "stbllm/quantize/nm_select.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "stbllm/base/bits.h"
#include "stbllm/base/lanes.h"

namespace stbllm {

ImportanceScore::ImportanceScore(const at::Tensor& weight_t, Importance metric) : metric_(metric) {
  if (metric != Importance::kRia && metric != Importance::kSi) return;
  row_sum_ = weight_t.abs().sum(0, /*keepdim=*/true).clamp_min(1e-30);
  if (metric == Importance::kRia) return;
  const at::Tensor mu = relative_magnitude(weight_t);
  // Sums go column by column first: a reduction over all elements would be cut differently by another number
  // of threads.
  const double count = static_cast<double>(mu.numel());
  mean_ = mu.sum(1, false, at::kDouble).sum() / count;
  deviation_ = (mu - mean_).square().sum(1, false, at::kDouble).sum().div(count - 1).sqrt();
}

at::Tensor ImportanceScore::relative_magnitude(const at::Tensor& columns_t) const {
  const at::Tensor magnitude = columns_t.abs();
  return magnitude / row_sum_ + magnitude / magnitude.sum(1, /*keepdim=*/true).clamp_min(1e-30);
}

at::Tensor ImportanceScore::operator()(const at::Tensor& columns_t, const at::Tensor& norm_sq,
                                       const at::Tensor& inverse_diag) const {
  switch (metric_) {
    case Importance::kMagnitude:
      return columns_t.abs();
    case Importance::kWanda:
      return columns_t.abs() * norm_sq.sqrt().unsqueeze(1);
    case Importance::kRia:
      return relative_magnitude(columns_t) * norm_sq.sqrt().sqrt().unsqueeze(1);
    case Importance::kSi:
      return ((relative_magnitude(columns_t) - mean_) / (deviation_ + 1e-12)).to(at::kFloat) *
             norm_sq.sqrt().unsqueeze(1);
    case Importance::kObs:
      return (columns_t / inverse_diag.unsqueeze(1)).square();
  }
  return columns_t.abs();
}

namespace {

/// kLanes rows of a group; `stride` apart from column to column. A column's rank is the number of columns
/// that go before it.
STBLLM_CLONES void keep_largest(const float* score, int64_t stride, int width, int keep, int lanes,
                                uint8_t* kept) {
  int32_t rank[16][kLanes] = {};
  for (int b = 1; b < width; ++b)
    for (int a = 0; a < b; ++a)
      for (int lane = 0; lane < lanes; ++lane) {
        const int32_t later_wins =
            score[b * stride + lane] > score[a * stride + lane];  // of equals the first one goes before
        rank[a][lane] += later_wins;
        rank[b][lane] += 1 - later_wins;
      }
  for (int c = 0; c < width; ++c)
    for (int lane = 0; lane < lanes; ++lane) kept[c * stride + lane] = rank[c][lane] < keep;
}

}  // namespace

at::Tensor nm_mask(const at::Tensor& score_t, NmPattern nm) {
  const int64_t cols = score_t.size(0), rows = score_t.size(1);
  at::Tensor mask = at::empty({cols, rows}, at::kByte);
  const int64_t groups = ceil_div(cols, nm.group);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * nm.group;
      const int width = static_cast<int>(std::min<int64_t>(nm.group, cols - first));
      for (int64_t row = 0; row < rows; row += kLanes)
        keep_largest(score_t.data_ptr<float>() + first * rows + row, rows, width, std::min(nm.keep, width),
                     static_cast<int>(std::min<int64_t>(kLanes, rows - row)),
                     mask.data_ptr<uint8_t>() + first * rows + row);
    }
  });
  return mask;
}

}  // namespace stbllm
