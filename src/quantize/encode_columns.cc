// Codes from left to right with error feedback: GPTQ's inner loop, a group of M columns at a time.
//
// With the columns before it fixed, choosing q for group g costs, after the best answer of all later columns,
//   e (U_gg^T U_gg)^-1 e^T,  e = w - q,   and moves them by  -(e U_gg^-1) U[g, later].
// The code of a group is the state with the smallest such cost, its support included: nothing is chosen by
// magnitude.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "column_groups.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/lanes.h"
#include "stbllm/base/profile.h"
#include "stbllm/quantize/tensor_search.h"

namespace stbllm {
namespace {

STBLLM_CLONES void apply_matrix(const float* matrix, const float (*in)[kTileRows], int width,
                                float (*out)[kTileRows]) {
  for (int i = 0; i < width; ++i) {
    for (int lane = 0; lane < kTileRows; ++lane) out[i][lane] = 0;
    for (int j = 0; j < width; ++j)
      for (int lane = 0; lane < kTileRows; ++lane) out[i][lane] += matrix[i * width + j] * in[j][lane];
  }
}

/// sums[lane] += the `keep` largest magnitudes of a group.
STBLLM_CLONES void add_largest(const float (*weights)[kTileRows], int width, int keep, float* sums) {
  for (int i = 0; i < width; ++i) {
    int32_t before[kTileRows] = {};
    for (int j = 0; j < width; ++j)
      for (int lane = 0; lane < kTileRows; ++lane) {
        const float own = std::fabs(weights[i][lane]), other = std::fabs(weights[j][lane]);
        before[lane] += j < i ? other >= own : other > own;
      }
    for (int lane = 0; lane < kTileRows; ++lane)
      sums[lane] += before[lane] < keep ? std::fabs(weights[i][lane]) : 0.f;
  }
}

/// sums[lane] += a . b over a group
STBLLM_CLONES void add_dot(const float (*a)[kTileRows], const float (*b)[kTileRows], int width, float* sums) {
  for (int i = 0; i < width; ++i)
    for (int lane = 0; lane < kTileRows; ++lane) sums[lane] += a[i][lane] * b[i][lane];
}

/// out = a - b over a group
STBLLM_CLONES void subtract(const float (*a)[kTileRows], const float (*b)[kTileRows], int width,
                            float (*out)[kTileRows]) {
  for (int i = 0; i < width; ++i)
    for (int lane = 0; lane < kTileRows; ++lane) out[i][lane] = a[i][lane] - b[i][lane];
}

/// weights[c] -= sum_k error[k] U[k][c] for the columns after the group.
STBLLM_CLONES void push_error(const float* upper, int64_t stride, int width, int begin, int end,
                              const float (*error)[kTileRows], float (*weights)[kTileRows]) {
  for (int c = begin; c < end; ++c)
    for (int k = 0; k < width; ++k) {
      const float factor = upper[k * stride + c];
      for (int lane = 0; lane < kTileRows; ++lane) weights[c][lane] -= error[k][lane] * factor;
    }
}

/// One column block of kTileRows rows on its way through the search. A row is a lane.
class TileEncoder {
 public:
  TileEncoder(const LeanWeight& lean, const std::vector<ColumnGroup>& groups, int width)
      : lean_(lean), groups_(groups), width_(width), storage_(2 * width + 2 * kMostColumns) {
    weights_ = reinterpret_cast<float(*)[kTileRows]>(storage_.data());
    error_ = weights_ + width;
    target_ = error_ + width;
    values_ = target_ + kMostColumns;
  }

  /// weights: (cols of the block, rows) from the tile's first row on, of which it has `lanes`.
  void load(const float* weights, int64_t rows, int lanes) {
    lanes_ = lanes;
    load_tile(weights, rows, width_, lanes, weights_);
  }

  /// Fits the scale of the block to its current weights: codes and scale in turn, without feedback, from the
  /// mean kept magnitude.
  void fit_scale(float mean_level) {
    float top[kTileRows] = {}, bottom[kTileRows];
    int kept = 0;
    for (const ColumnGroup& group : groups_) {
      add_largest(weights_ + group.first, group.width, lean_.nm.keep, top);
      kept += std::min(lean_.nm.keep, group.width);
    }
    for (int lane = 0; lane < kTileRows; ++lane)
      scale[lane] = std::max(top[lane] / (static_cast<float>(kept) * mean_level), kSmallestScale);
    for (int search = 1; search < kEncodeSearches; ++search) {
      std::fill_n(top, kTileRows, 0.f);
      std::fill_n(bottom, kTileRows, 0.f);
      for (const ColumnGroup& group : groups_) {
        choose(group);
        add_dot(values_, target_, group.width, top);
        apply_matrix(group.metric_f.data(), values_, group.width, target_);
        add_dot(values_, target_, group.width, bottom);
      }
      for (int lane = 0; lane < lanes_; ++lane)
        if (bottom[lane] > 0 && top[lane] > 0)
          scale[lane] = std::max(scale[lane] * (top[lane] / bottom[lane]), kSmallestScale);
    }
  }

  /// Chooses the codes of all groups for good. `upper`: U from the block's first row and column on, whose
  /// rows are `stride` apart; null pushes no error into later groups. symbols, errors: (cols of the block,
  /// rows) from the tile's first row on.
  void encode(const float* upper, int64_t stride, int8_t* symbols, float* errors, int64_t rows) {
    for (const ColumnGroup& group : groups_) {
      choose(group);
      subtract(weights_ + group.first, values_, group.width, target_);
      apply_matrix(group.transposed.data(), target_, group.width, error_ + group.first);
      if (upper != nullptr)
        push_error(upper + group.first * stride, stride, group.width, group.first + group.width, width_,
                   error_ + group.first, weights_);
      store_tile(chosen_, group.width, lanes_, symbols + group.first * rows, rows);
    }
    store_tile(error_, width_, lanes_, errors, rows);
  }

  alignas(64) float scale[kTileRows];  ///< by lane

 private:
  static constexpr int kMostColumns = 16;  // of a group

  /// The best code of a group at the current scale: fills chosen_ and its values, and target_ with A w.
  void choose(const ColumnGroup& group) {
    apply_matrix(group.metric_f.data(), weights_ + group.first, group.width, target_);
    if (group.table) {
      best_codes(*group.table, target_, scale, group.width, chosen_);
    } else {
      for (int c = 0; c < group.width; ++c) std::fill_n(chosen_[c], kTileRows, int8_t{0});
      improve_codes_locally(lean_.nm, lean_.level_values, group.metric.data(), target_, scale, group.width,
                            lanes_, chosen_);
    }
    dequantize(chosen_, lean_.level_values, scale, group.width, values_);
  }

  const LeanWeight& lean_;
  const std::vector<ColumnGroup>& groups_;
  const int width_;
  int lanes_ = 0;
  std::vector<std::array<float, kTileRows>> storage_;
  float (*weights_)[kTileRows], (*error_)[kTileRows], (*target_)[kTileRows], (*values_)[kTileRows];
  int8_t chosen_[kMostColumns][kTileRows];
};

}  // namespace

void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate) {
  if (!lean.target.is_cpu()) return by_tensors::encode_columns(lean, upper, compensate);
  const int64_t rows = lean.rows(), cols = lean.cols(), stride = cols;
  const int levels = static_cast<int>(lean.level_values.size());
  const GroupCodebooks codebooks(lean.nm, levels, cols);
  at::Tensor work = lean.target.clone();
  const float mean_level =
      std::accumulate(lean.level_values.begin(), lean.level_values.end(), 0.f) / static_cast<float>(levels);

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const int64_t start = block.start, rest = block.rest;
    const int width = static_cast<int>(block.width);
    const at::Tensor factor = compensate == Compensate::kNone ? at::Tensor() : block.host_part(upper);
    const std::vector<ColumnGroup> groups = groups_by_factor(lean, codebooks, block, factor, compensate);
    const float* feedback =
        compensate == Compensate::kColumn ? upper.const_data_ptr<float>() + start * stride + start : nullptr;
    at::Tensor errors = at::zeros({width, rows}, at::kFloat);
    const float* weights = work.const_data_ptr<float>() + start * rows;
    int8_t* symbols = lean.symbols.data_ptr<int8_t>() + start * rows;
    float* error = errors.data_ptr<float>();
    at::parallel_for(0, ceil_div(rows, kTileRows), 1, [&](int64_t begin, int64_t end) {
      TileEncoder tile(lean, groups, width);
      for (int64_t first = begin * kTileRows; first < std::min(end * kTileRows, rows); first += kTileRows) {
        const int lanes = static_cast<int>(std::min<int64_t>(kTileRows, rows - first));
        tile.load(weights + first, rows, lanes);
        tile.fit_scale(mean_level);
        for (int lane = 0; lane < lanes; ++lane)
          tile.scale[lane] = lean.set_scale(b, first + lane, tile.scale[lane]);
        tile.encode(feedback, stride, symbols + first, error + first, rows);
      }
    });
    if (compensate != Compensate::kNone && rest > 0) {
      const StageTimer timer("products", 2.0 * static_cast<double>(rest * width * rows));
      work.narrow(0, start + width, rest)
          .addmm_(upper.narrow(0, start, width).narrow(1, start + width, rest).t(), errors, 1, -1);
    }
  }
}

}  // namespace stbllm
