#include "stbllm/quantize/binarize.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/quantize/lanes.h"

namespace stbllm {
namespace {

constexpr int kMaxBlock = 256;  // columns of a column block that fit the tile below

/// Sixteen rows of a column block. Lanes past the last row are not kept.
struct Tile {
  alignas(64) float value[kMaxBlock][kLanes];
  alignas(64) float kept[kMaxBlock][kLanes];
};

void load_tile(const ColumnBlock& block, const int64_t* order, int64_t first_row, Tile& tile) {
  const int64_t cols = block.values.size(0), rows = block.values.size(1);
  const float* values = block.values.data_ptr<float>();
  const uint8_t* kept = block.kept.data_ptr<uint8_t>();
  for (int64_t c = 0; c < cols; ++c) {
    const int64_t source = (order ? order[c] : c) * rows + first_row;
    for (int lane = 0; lane < kLanes; ++lane) {
      const bool inside = first_row + lane < rows;
      tile.value[c][lane] = inside ? values[source + lane] : 0.f;
      tile.kept[c][lane] = inside && kept[source + lane] ? 1.f : 0.f;
    }
  }
}

/// Mean and scale of each order, per row.
struct SetFit {
  alignas(64) float mean[2][kLanes];
  alignas(64) float scale[2][kLanes];
};

STBLLM_INLINE float residual_of(float x, const SetFit& fit, int orders, int lane) {
  for (int o = 0; o < orders; ++o) {
    const float centred = x - fit.mean[o][lane];
    x = centred - (centred > 0 ? fit.scale[o][lane] : centred < 0 ? -fit.scale[o][lane] : 0.f);
  }
  return x;
}

/// Fits the weights of columns [begin, end) whose mask is 1.
STBLLM_INLINE void fit_set(const float (*value)[kLanes], const float (*mask)[kLanes], int begin, int end, int orders, bool means,
                           SetFit& fit) {
  float inverse_count[kLanes];
  {
    float count[kLanes] = {};
    for (int c = begin; c < end; ++c)
      for (int lane = 0; lane < kLanes; ++lane) count[lane] += mask[c][lane];
    for (int lane = 0; lane < kLanes; ++lane) inverse_count[lane] = count[lane] > 0 ? 1.f / count[lane] : 0.f;
  }
  for (int order = 0; order < orders; ++order) {
    float sum[kLanes] = {};
    if (means) {
      for (int c = begin; c < end; ++c)
        for (int lane = 0; lane < kLanes; ++lane) sum[lane] += mask[c][lane] * residual_of(value[c][lane], fit, order, lane);
    }
    for (int lane = 0; lane < kLanes; ++lane) fit.mean[order][lane] = sum[lane] * inverse_count[lane];
    float deviation[kLanes] = {};
    for (int c = begin; c < end; ++c)
      for (int lane = 0; lane < kLanes; ++lane)
        deviation[lane] += mask[c][lane] * std::fabs(residual_of(value[c][lane], fit, order, lane) - fit.mean[order][lane]);
    for (int lane = 0; lane < kLanes; ++lane) fit.scale[order][lane] = deviation[lane] * inverse_count[lane];
  }
}

STBLLM_INLINE void add_error(const float (*value)[kLanes], const float (*mask)[kLanes], const float* weight, int begin, int end,
                             int orders, const SetFit& fit, float (&error)[kLanes]) {
  for (int c = begin; c < end; ++c)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float r = residual_of(value[c][lane], fit, orders, lane);
      error[lane] += weight[c] * mask[c][lane] * r * r;
    }
}

double sum_lanes(const float (&lanes)[kLanes]) {
  double sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

STBLLM_CLONES void salient_errors(const Tile& tile, const float* weight, int cols, int min_count, int max_count, int rest_order,
                                  bool means, double* error) {
  SetFit fit;
  for (int count = min_count; count <= max_count; ++count) {
    float lanes[kLanes] = {};
    fit_set(tile.value, tile.kept, 0, count, 2, means, fit);
    add_error(tile.value, tile.kept, weight, 0, count, 2, fit, lanes);
    fit_set(tile.value, tile.kept, count, cols, rest_order, means, fit);
    add_error(tile.value, tile.kept, weight, count, cols, rest_order, fit, lanes);
    error[count - min_count] = sum_lanes(lanes);
  }
}

STBLLM_CLONES void region_errors(const Tile& tile, const float* weight, int cols, const float* thresholds, int count, int levels,
                                 bool means, double* error) {
  for (int t = 0; t < count; ++t) {
    const float p1 = thresholds[t], p2 = levels == 3 ? 2 * p1 : std::numeric_limits<float>::infinity();
    float number[3][kLanes] = {}, sum[3][kLanes] = {}, scale[3][kLanes] = {};
    for (int c = 0; c < cols; ++c)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = tile.value[c][lane], m = tile.kept[c][lane], magnitude = std::fabs(x);
        const float dense = magnitude < p1 ? m : 0.f, sparse = magnitude >= p2 ? m : 0.f, middle = m - dense - sparse;
        number[0][lane] += dense, number[1][lane] += middle, number[2][lane] += sparse;
        const float term = means ? x : magnitude;
        sum[0][lane] += dense * term, sum[1][lane] += middle * term, sum[2][lane] += sparse * term;
      }
    float mean[3][kLanes];
    for (int r = 0; r < 3; ++r)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float average = number[r][lane] > 0 ? sum[r][lane] / number[r][lane] : 0.f;
        mean[r][lane] = means ? average : 0.f;
        scale[r][lane] = means ? 0.f : average;
      }
    if (means) {
      for (int c = 0; c < cols; ++c)
        for (int lane = 0; lane < kLanes; ++lane) {
          const float x = tile.value[c][lane], m = tile.kept[c][lane], magnitude = std::fabs(x);
          const float dense = magnitude < p1 ? m : 0.f, sparse = magnitude >= p2 ? m : 0.f, middle = m - dense - sparse;
          scale[0][lane] += dense * std::fabs(x - mean[0][lane]);
          scale[1][lane] += middle * std::fabs(x - mean[1][lane]);
          scale[2][lane] += sparse * std::fabs(x - mean[2][lane]);
        }
      for (int r = 0; r < 3; ++r)
        for (int lane = 0; lane < kLanes; ++lane)
          scale[r][lane] = number[r][lane] > 0 ? scale[r][lane] / number[r][lane] : 0.f;
    }
    float lanes[kLanes] = {};
    for (int c = 0; c < cols; ++c)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = tile.value[c][lane], magnitude = std::fabs(x);
        const bool dense = magnitude < p1, sparse = magnitude >= p2;
        const float centre = dense ? mean[0][lane] : sparse ? mean[2][lane] : mean[1][lane];
        const float step = dense ? scale[0][lane] : sparse ? scale[2][lane] : scale[1][lane];
        const float centred = x - centre;
        const float r = centred > 0 ? centred - step : centred < 0 ? centred + step : 0.f;
        lanes[lane] += weight[c] * tile.kept[c][lane] * r * r;
      }
    error[t] = sum_lanes(lanes);
  }
}

/// Sums per-tile errors in the order of the tiles and returns the first smallest candidate.
int best_candidate(const std::vector<double>& errors, int64_t tiles, int candidates) {
  int best = 0;
  double smallest = std::numeric_limits<double>::infinity();
  for (int candidate = 0; candidate < candidates; ++candidate) {
    double sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += errors[tile * candidates + candidate];
    if (sum < smallest) smallest = sum, best = candidate;
  }
  return best;
}

}  // namespace

int search_salient(const ColumnBlock& block, const std::vector<int64_t>& order, int min_count, int max_count, int rest_order,
                   bool means) {
  const int cols = static_cast<int>(block.values.size(0));
  STBLLM_CHECK(cols <= kMaxBlock, "a column block of {} columns, at most {}", cols, kMaxBlock);
  const int candidates = std::min(max_count, cols) - min_count + 1;
  const int64_t tiles = ceil_div(block.values.size(1), kLanes);
  std::vector<double> errors(tiles * candidates);
  std::vector<float> weight(cols);
  for (int c = 0; c < cols; ++c) weight[c] = block.weight.data_ptr<float>()[order[c]];
  at::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t t = begin; t < end; ++t) {
      load_tile(block, order.data(), t * kLanes, tile);
      salient_errors(tile, weight.data(), cols, min_count, min_count + candidates - 1, rest_order, means, &errors[t * candidates]);
    }
  });
  return min_count + best_candidate(errors, tiles, candidates);
}

float search_regions(const ColumnBlock& block, const std::vector<uint8_t>& salient, const std::vector<float>& thresholds,
                     int levels, bool means, bool upper_quantile_rule) {
  const int cols = static_cast<int>(block.values.size(0));
  STBLLM_CHECK(cols <= kMaxBlock, "a column block of {} columns, at most {}", cols, kMaxBlock);
  int candidates = static_cast<int>(thresholds.size());
  if (upper_quantile_rule)
    while (candidates > 1 && 2 * thresholds[candidates - 1] > thresholds.back()) --candidates;
  const int64_t tiles = ceil_div(block.values.size(1), kLanes);
  std::vector<double> errors(tiles * candidates);
  const float* weight = block.weight.data_ptr<float>();
  at::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t t = begin; t < end; ++t) {
      load_tile(block, nullptr, t * kLanes, tile);
      for (int c = 0; c < cols; ++c)
        if (salient[c]) std::fill_n(tile.kept[c], kLanes, 0.f);
      region_errors(tile, weight, cols, thresholds.data(), candidates, levels, means, &errors[t * candidates]);
    }
  });
  return thresholds[best_candidate(errors, tiles, candidates)];
}

at::Tensor assign_sets(const ColumnBlock& block, const std::vector<uint8_t>& salient, float p1, int levels) {
  const int64_t cols = block.values.size(0), rows = block.values.size(1);
  at::Tensor sets = at::empty({cols, rows}, at::kByte);
  const float* values = block.values.data_ptr<float>();
  const uint8_t* kept = block.kept.data_ptr<uint8_t>();
  uint8_t* out = sets.data_ptr<uint8_t>();
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t i = c * rows; i < (c + 1) * rows; ++i) {
      const float magnitude = std::fabs(values[i]);
      const int region = 1 + (levels >= 2 && magnitude >= p1) + (levels >= 3 && magnitude >= 2 * p1);
      out[i] = !kept[i] ? 0 : salient[c] ? kSalientSet : static_cast<uint8_t>(region);
    }
  return sets;
}

BinarizedBlock binarize_sets(const at::Tensor& values, const at::Tensor& sets, int levels, bool means) {
  // Plain tensor operations, and on (rows, cols) so that sums run along rows: where a residual is zero up to rounding, its sign
  // is then the one of the released code.
  const at::Tensor w = values.t().contiguous(), set_of = sets.t().contiguous();
  const int64_t rows = w.size(0);
  const int slots = levels + 2;
  BinarizedBlock result{at::zeros({rows, slots}, at::kFloat), at::zeros({rows, slots}, at::kFloat), at::zeros_like(w, at::kChar),
                        at::zeros_like(w, at::kChar)};
  for (int slot = 0; slot <= levels; ++slot) {
    const at::Tensor member = set_of.eq(slot == levels ? kSalientSet : slot + 1);
    at::Tensor residual = w;
    for (int order = 0; order < (slot == levels ? 2 : 1); ++order) {
      at::Tensor masked = at::where(member, residual, NAN);
      const at::Tensor mean = means ? at::nanmean(masked, 1).nan_to_num(0) : at::zeros({rows}, at::kFloat);
      masked.sub_(mean.unsqueeze(1));
      const at::Tensor scale = at::nanmean(masked.abs(), 1).nan_to_num(0);
      result.mean.select(1, slot + order).copy_(mean);
      result.scale.select(1, slot + order).copy_(scale);
      // A weight exactly at the mean has no sign in the released code; a packed weight always has one.
      const at::Tensor sign = means ? masked.sign() : at::where(masked.lt(0), -1.f, 1.f);
      at::Tensor& out = order == 0 ? result.sign : result.residual_sign;
      out = at::where(member, sign.nan_to_num(0).to(at::kChar), out);
      residual = residual - (sign * scale.unsqueeze(1) + mean.unsqueeze(1));
    }
  }
  result.sign = result.sign.t().contiguous();
  result.residual_sign = result.residual_sign.t().contiguous();
  return result;
}

}  // namespace stbllm
