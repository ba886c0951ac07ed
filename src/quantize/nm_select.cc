#include "stbllm/quantize/nm_select.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "stbllm/base/bits.h"
#include "stbllm/quantize/lanes.h"

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

namespace {

/// kLanes rows of a group; `stride` apart from column to column. A column's rank is the number of columns that go before it.
STBLLM_CLONES void keep_largest(const float* score, int64_t stride, int width, int keep, int lanes, uint8_t* kept) {
  int32_t rank[16][kLanes] = {};
  for (int b = 1; b < width; ++b)
    for (int a = 0; a < b; ++a)
      for (int lane = 0; lane < lanes; ++lane) {
        const int32_t later_wins = score[b * stride + lane] > score[a * stride + lane];  // of equals the first one goes before
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
                     static_cast<int>(std::min<int64_t>(kLanes, rows - row)), mask.data_ptr<uint8_t>() + first * rows + row);
    }
  });
  return mask;
}

}  // namespace stbllm
