#include "stbllm/quantize/binarize.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/lanes.h"

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
STBLLM_INLINE void fit_set(const float (*value)[kLanes], const float (*mask)[kLanes], int begin, int end,
                           int orders, bool means, SetFit& fit) {
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
        for (int lane = 0; lane < kLanes; ++lane)
          sum[lane] += mask[c][lane] * residual_of(value[c][lane], fit, order, lane);
    }
    for (int lane = 0; lane < kLanes; ++lane) fit.mean[order][lane] = sum[lane] * inverse_count[lane];
    float deviation[kLanes] = {};
    for (int c = begin; c < end; ++c)
      for (int lane = 0; lane < kLanes; ++lane)
        deviation[lane] +=
            mask[c][lane] * std::fabs(residual_of(value[c][lane], fit, order, lane) - fit.mean[order][lane]);
    for (int lane = 0; lane < kLanes; ++lane) fit.scale[order][lane] = deviation[lane] * inverse_count[lane];
  }
}

STBLLM_INLINE void add_error(const float (*value)[kLanes], const float (*mask)[kLanes], const float* weight,
                             int begin, int end, int orders, const SetFit& fit, float (&error)[kLanes]) {
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

/// Any order of the rest, around means or not: every set is fitted again for every count (the released
/// arithmetic).
STBLLM_CLONES void salient_errors_by_fits(const Tile& tile, const float* weight, int cols, int min_count,
                                          int max_count, int rest_order, bool means, double* error) {
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

/// Without means a set with the scale a costs  sum w (|x| - a)^2 = sum w x^2 - 2 a sum w |x| + a^2 sum w,
/// which running sums over the columns give for every count; only the second order of the salient columns
/// looks at them again.
struct SetSums {
  alignas(64) double count[kLanes], magnitude[kLanes], weight[kLanes], weighted[kLanes], energy[kLanes];
};

STBLLM_INLINE void add_column(SetSums& sums, const Tile& tile, int c, double weight, double sign) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const double x = std::fabs(tile.value[c][lane]), m = sign * tile.kept[c][lane], w = m * weight;
    sums.count[lane] += m, sums.magnitude[lane] += m * x;
    sums.weight[lane] += w, sums.weighted[lane] += w * x, sums.energy[lane] += w * x * x;
  }
}

STBLLM_CLONES void salient_errors(const Tile& tile, const float* weight, int cols, int min_count,
                                  int max_count, double* error) {
  SetSums salient = {}, rest = {};
  for (int c = 0; c < cols; ++c) add_column(rest, tile, c, weight[c], 1);
  for (int count = 0; count <= max_count; ++count) {
    if (count > 0) {
      add_column(salient, tile, count - 1, weight[count - 1], 1);
      add_column(rest, tile, count - 1, weight[count - 1], -1);
    }
    if (count < min_count) continue;
    alignas(64) float first[kLanes], deviation[kLanes] = {}, weighted_deviation[kLanes] = {};
    for (int lane = 0; lane < kLanes; ++lane)
      first[lane] =
          salient.count[lane] > 0 ? static_cast<float>(salient.magnitude[lane] / salient.count[lane]) : 0.f;
    for (int c = 0; c < count; ++c)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float r = tile.kept[c][lane] * std::fabs(std::fabs(tile.value[c][lane]) - first[lane]);
        deviation[lane] += r, weighted_deviation[lane] += weight[c] * r;
      }
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const double a = first[lane], b = salient.count[lane] > 0 ? deviation[lane] / salient.count[lane] : 0;
      const double scale = rest.count[lane] > 0 ? rest.magnitude[lane] / rest.count[lane] : 0;
      sum += salient.energy[lane] - 2 * a * salient.weighted[lane] + (a * a + b * b) * salient.weight[lane] -
             2 * b * weighted_deviation[lane];
      sum += rest.energy[lane] - 2 * scale * rest.weighted[lane] + scale * scale * rest.weight[lane];
    }
    error[count - min_count] = sum;
  }
}

/// Around the mean of each region, recomputed for every threshold (the released arithmetic).
STBLLM_CLONES void region_errors_with_means(const Tile& tile, const float* weight, int cols,
                                            const float* thresholds, int count, int levels, double* error) {
  for (int t = 0; t < count; ++t) {
    const float p1 = thresholds[t], p2 = levels == 3 ? 2 * p1 : std::numeric_limits<float>::infinity();
    float number[3][kLanes] = {}, mean[3][kLanes] = {}, scale[3][kLanes] = {};
    for (int c = 0; c < cols; ++c)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = tile.value[c][lane], m = tile.kept[c][lane], magnitude = std::fabs(x);
        const float dense = magnitude < p1 ? m : 0.f, sparse = magnitude >= p2 ? m : 0.f,
                    middle = m - dense - sparse;
        number[0][lane] += dense, number[1][lane] += middle, number[2][lane] += sparse;
        mean[0][lane] += dense * x, mean[1][lane] += middle * x, mean[2][lane] += sparse * x;
      }
    for (int r = 0; r < 3; ++r)
      for (int lane = 0; lane < kLanes; ++lane)
        mean[r][lane] = number[r][lane] > 0 ? mean[r][lane] / number[r][lane] : 0.f;
    for (int c = 0; c < cols; ++c)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = tile.value[c][lane], m = tile.kept[c][lane], magnitude = std::fabs(x);
        const float dense = magnitude < p1 ? m : 0.f, sparse = magnitude >= p2 ? m : 0.f,
                    middle = m - dense - sparse;
        scale[0][lane] += dense * std::fabs(x - mean[0][lane]);
        scale[1][lane] += middle * std::fabs(x - mean[1][lane]);
        scale[2][lane] += sparse * std::fabs(x - mean[2][lane]);
      }
    for (int r = 0; r < 3; ++r)
      for (int lane = 0; lane < kLanes; ++lane)
        scale[r][lane] = number[r][lane] > 0 ? scale[r][lane] / number[r][lane] : 0.f;
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

constexpr int kMaxThresholds =
    255;  // one less than a power of two: the binary search below has no special cases

/// What a region's error needs to know of it; per row.
struct RegionSums {
  alignas(64) float count[kLanes], magnitude[kLanes], weight[kLanes], weighted[kLanes];
};

/// Sums per cell between thresholds. Cell i holds what is at least i thresholds and below the next.
struct RegionCells {
  RegionSums below[kMaxThresholds + 1];  ///< by |x| against p1
  RegionSums half[kMaxThresholds + 1];   ///< by |x| / 2 against p1, which is |x| against p2
};

STBLLM_INLINE void add_sums(RegionSums& sums, const RegionSums& more) {
  for (int lane = 0; lane < kLanes; ++lane) {
    sums.count[lane] += more.count[lane], sums.magnitude[lane] += more.magnitude[lane];
    sums.weight[lane] += more.weight[lane], sums.weighted[lane] += more.weighted[lane];
  }
}

STBLLM_INLINE float region_cost(float count, float magnitude, float weight, float weighted) {
  const float scale = count > 0 ? magnitude / count : 0.f;
  return scale * (scale * weight - 2 * weighted);
}

/// Without means a region costs -2 a sum w |x| + a^2 sum w (and sum w x^2, the same for every threshold), so
/// that all thresholds are served by sums over cells, from the smallest magnitudes (dense) and from the
/// largest (sparse). `table`: the thresholds, filled up with infinity.
STBLLM_CLONES void region_errors(const Tile& tile, const float* weight, int cols,
                                 const float (&table)[kMaxThresholds], int count, int levels,
                                 RegionCells& cells, double* error) {
  std::fill_n(reinterpret_cast<float*>(cells.below), (count + 1) * sizeof(RegionSums) / sizeof(float), 0.f);
  std::fill_n(reinterpret_cast<float*>(cells.half), (count + 1) * sizeof(RegionSums) / sizeof(float), 0.f);
  RegionSums total = {};
  for (int c = 0; c < cols; ++c) {
    alignas(64) int32_t below[kLanes] = {}, half[kLanes] = {};
    for (int step = (kMaxThresholds + 1) / 2; step > 0; step /= 2)
      for (int lane = 0; lane < kLanes; ++lane) {
        const float x = std::fabs(tile.value[c][lane]);
        below[lane] += table[below[lane] + step - 1] <= x ? step : 0;
        half[lane] += table[half[lane] + step - 1] <= 0.5f * x ? step : 0;
      }
    alignas(64) float magnitude[kLanes], w[kLanes], weighted[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      magnitude[lane] = tile.kept[c][lane] * std::fabs(tile.value[c][lane]);
      w[lane] = tile.kept[c][lane] * weight[c];
      weighted[lane] = weight[c] * magnitude[lane];
      total.count[lane] += tile.kept[c][lane], total.magnitude[lane] += magnitude[lane];
      total.weight[lane] += w[lane], total.weighted[lane] += weighted[lane];
    }
    for (int lane = 0; lane < kLanes; ++lane)
      for (RegionSums* sums : {&cells.below[below[lane]], &cells.half[half[lane]]}) {
        sums->count[lane] += tile.kept[c][lane], sums->magnitude[lane] += magnitude[lane];
        sums->weight[lane] += w[lane], sums->weighted[lane] += weighted[lane];
      }
  }
  // |x| >= 2 p1 is "at least threshold t": the cells after t, summed from the top.
  for (int t = count - 1; t >= 1; --t) add_sums(cells.half[t], cells.half[t + 1]);
  RegionSums dense = {};
  const RegionSums none = {};
  for (int t = 0; t < count; ++t) {
    add_sums(dense, cells.below[t]);
    const RegionSums& sparse = levels == 3 ? cells.half[t + 1] : none;
    float lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      lanes[lane] =
          region_cost(dense.count[lane], dense.magnitude[lane], dense.weight[lane], dense.weighted[lane]) +
          region_cost(sparse.count[lane], sparse.magnitude[lane], sparse.weight[lane],
                      sparse.weighted[lane]) +
          region_cost(total.count[lane] - dense.count[lane] - sparse.count[lane],
                      total.magnitude[lane] - dense.magnitude[lane] - sparse.magnitude[lane],
                      total.weight[lane] - dense.weight[lane] - sparse.weight[lane],
                      total.weighted[lane] - dense.weighted[lane] - sparse.weighted[lane]);
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

int search_salient(const ColumnBlock& block, const std::vector<int64_t>& order, int min_count, int max_count,
                   int rest_order, bool means) {
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
      double* error = &errors[t * candidates];
      if (means || rest_order > 1)
        salient_errors_by_fits(tile, weight.data(), cols, min_count, min_count + candidates - 1, rest_order,
                               means, error);
      else
        salient_errors(tile, weight.data(), cols, min_count, min_count + candidates - 1, error);
    }
  });
  return min_count + best_candidate(errors, tiles, candidates);
}

float search_regions(const ColumnBlock& block, const std::vector<uint8_t>& salient,
                     const std::vector<float>& thresholds, int levels, bool means, bool upper_quantile_rule) {
  const int cols = static_cast<int>(block.values.size(0));
  STBLLM_CHECK(cols <= kMaxBlock, "a column block of {} columns, at most {}", cols, kMaxBlock);
  int candidates = static_cast<int>(thresholds.size());
  if (upper_quantile_rule)
    while (candidates > 1 && 2 * thresholds[candidates - 1] > thresholds.back()) --candidates;
  const int64_t tiles = ceil_div(block.values.size(1), kLanes);
  std::vector<double> errors(tiles * candidates);
  const float* weight = block.weight.data_ptr<float>();
  STBLLM_CHECK(candidates <= kMaxThresholds, "{} thresholds, at most {}", candidates, kMaxThresholds);
  float table[kMaxThresholds];
  std::fill_n(std::copy_n(thresholds.begin(), candidates, table), kMaxThresholds - candidates,
              std::numeric_limits<float>::infinity());
  at::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    Tile tile;
    const auto cells = std::make_unique<RegionCells>();
    for (int64_t t = begin; t < end; ++t) {
      load_tile(block, nullptr, t * kLanes, tile);
      for (int c = 0; c < cols; ++c)
        if (salient[c]) std::fill_n(tile.kept[c], kLanes, 0.f);
      if (means)
        region_errors_with_means(tile, weight, cols, thresholds.data(), candidates, levels,
                                 &errors[t * candidates]);
      else
        region_errors(tile, weight, cols, table, candidates, levels, *cells, &errors[t * candidates]);
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
  constexpr float kNever = std::numeric_limits<float>::infinity();
  const float middle = levels >= 2 ? p1 : kNever, sparse = levels >= 3 ? 2 * p1 : kNever;
  at::parallel_for(0, cols, 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t i = c * rows; i < (c + 1) * rows; ++i) {
        const float magnitude = std::fabs(values[i]);
        const int set = salient[c] ? kSalientSet : 1 + (magnitude >= middle) + (magnitude >= sparse);
        out[i] = static_cast<uint8_t>(kept[i] ? set : 0);
      }
  });
  return sets;
}

namespace {

/// Plain tensor operations, and on (rows, cols) so that sums run along rows: where a residual is zero up to
/// rounding, its sign is then the one of the released code.
BinarizedBlock binarize_with_means(const at::Tensor& values, const at::Tensor& sets, int levels) {
  const at::Tensor w = values.t().contiguous(), set_of = sets.t().contiguous();
  const int64_t rows = w.size(0);
  const int slots = levels + 2;
  BinarizedBlock result{at::zeros({rows, slots}, at::kFloat), at::zeros({rows, slots}, at::kFloat),
                        at::zeros_like(w, at::kChar), at::zeros_like(w, at::kChar)};
  for (int slot = 0; slot <= levels; ++slot) {
    const at::Tensor member = set_of.eq(slot == levels ? kSalientSet : slot + 1);
    at::Tensor residual = w;
    for (int order = 0; order < (slot == levels ? 2 : 1); ++order) {
      at::Tensor masked = at::where(member, residual, NAN);
      const at::Tensor mean = at::nanmean(masked, 1).nan_to_num(0);
      masked.sub_(mean.unsqueeze(1));
      const at::Tensor scale = at::nanmean(masked.abs(), 1).nan_to_num(0);
      result.mean.select(1, slot + order).copy_(mean);
      result.scale.select(1, slot + order).copy_(scale);
      const at::Tensor sign = masked.sign();  // 0 for a weight exactly at the mean
      at::Tensor& out = order == 0 ? result.sign : result.residual_sign;
      out = at::where(member, sign.nan_to_num(0).to(at::kChar), out);
      residual = residual - (sign * scale.unsqueeze(1) + mean.unsqueeze(1));
    }
  }
  result.sign = result.sign.t().contiguous();
  result.residual_sign = result.residual_sign.t().contiguous();
  return result;
}

/// kLanes rows of binarize_sets without means; pointers to their first row, matrices `stride` apart from
/// column to column. scale: [slot][lane].
STBLLM_CLONES void binarize_lanes(const float* values, const uint8_t* sets, int64_t stride, int cols,
                                  int lanes, int levels, float (*scale)[kLanes], int8_t* sign,
                                  int8_t* residual_sign) {
  float count[5][kLanes] = {}, sum[5][kLanes] = {};  // by set; [0] takes what is pruned
  for (int c = 0; c < cols; ++c)
    for (int lane = 0; lane < lanes; ++lane) {
      const int set = sets[c * stride + lane];
      count[set][lane] += 1;
      sum[set][lane] += std::fabs(values[c * stride + lane]);
    }
  for (int slot = 0; slot <= levels; ++slot) {
    const int set = slot == levels ? kSalientSet : slot + 1;
    for (int lane = 0; lane < kLanes; ++lane)
      scale[slot][lane] = count[set][lane] > 0 ? sum[set][lane] / count[set][lane] : 0.f;
  }
  const float* first = scale[levels];
  float deviation[kLanes] = {};
  for (int c = 0; c < cols; ++c)
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t i = c * stride + lane;
      const float x = values[i], residual = x - (x < 0 ? -first[lane] : first[lane]);
      const bool kept = sets[i] != 0, salient = sets[i] == kSalientSet;
      deviation[lane] += salient ? std::fabs(residual) : 0.f;
      // A packed weight always has a sign, and a residual in a salient column too.
      sign[i] = static_cast<int8_t>(!kept ? 0 : x < 0 ? -1 : 1);
      residual_sign[i] = static_cast<int8_t>(!salient ? 0 : residual < 0 ? -1 : 1);
    }
  for (int lane = 0; lane < kLanes; ++lane)
    scale[levels + 1][lane] = count[kSalientSet][lane] > 0 ? deviation[lane] / count[kSalientSet][lane] : 0.f;
}

}  // namespace

BinarizedBlock binarize_sets(const at::Tensor& values, const at::Tensor& sets, int levels, bool means) {
  if (means) return binarize_with_means(values, sets, levels);
  const int64_t cols = values.size(0), rows = values.size(1), slots = levels + 2;
  BinarizedBlock result{at::empty({rows, slots}, at::kFloat), at::zeros({rows, slots}, at::kFloat),
                        at::empty({cols, rows}, at::kChar), at::empty({cols, rows}, at::kChar)};
  at::parallel_for(0, ceil_div(rows, kLanes), 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t * kLanes;
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, rows - row));
      float scale[5][kLanes];
      binarize_lanes(values.data_ptr<float>() + row, sets.data_ptr<uint8_t>() + row, rows,
                     static_cast<int>(cols), lanes, levels, scale, result.sign.data_ptr<int8_t>() + row,
                     result.residual_sign.data_ptr<int8_t>() + row);
      for (int lane = 0; lane < lanes; ++lane)
        for (int64_t slot = 0; slot < slots; ++slot)
          result.scale.data_ptr<float>()[(row + lane) * slots + slot] = scale[slot][lane];
    }
  });
  return result;
}

at::Tensor BinarizedBlock::dequantize(const at::Tensor& sets, int levels) const {
  const int64_t cols = sets.size(0), rows = sets.size(1), slots = scale.size(1);
  at::Tensor values = at::empty({cols, rows}, at::kFloat);
  at::parallel_for(0, cols, 4, [&](int64_t begin, int64_t end) {
    const float *a = scale.data_ptr<float>(), *m = mean.data_ptr<float>();
    const uint8_t* set_of = sets.data_ptr<uint8_t>();
    const int8_t *first = sign.data_ptr<int8_t>(), *second = residual_sign.data_ptr<int8_t>();
    float* out = values.data_ptr<float>();
    for (int64_t c = begin; c < end; ++c)
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t i = c * rows + row;
        const int set = set_of[i];
        const int64_t slot = row * slots + (set == kSalientSet ? levels : std::max(set - 1, 0));
        float value = a[slot] * first[i] + m[slot];
        if (set == kSalientSet) value += a[slot + 1] * second[i] + m[slot + 1];
        out[i] = set == 0 ? 0.f : value;
      }
  });
  return values;
}

}  // namespace stbllm
