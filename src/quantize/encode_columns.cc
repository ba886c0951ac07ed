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

}  // namespace

void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate) {
  if (!lean.target.is_cpu()) return by_tensors::encode_columns(lean, upper, compensate);
  const int64_t rows = lean.rows(), cols = lean.cols(), stride = cols;
  const int levels = static_cast<int>(lean.level_values.size());
  const GroupCodebooks codebooks(lean.nm, levels, cols);
  at::Tensor work = lean.target.clone();
  const float* u = compensate == Compensate::kNone ? nullptr : upper.const_data_ptr<float>();
  const float mean_level =
      std::accumulate(lean.level_values.begin(), lean.level_values.end(), 0.f) / static_cast<float>(levels);

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const int64_t start = block.start, rest = block.rest;
    const int width = static_cast<int>(block.width);
    const std::vector<ColumnGroup> groups = groups_by_factor(
        lean, codebooks, block, u == nullptr ? at::Tensor() : block.host_part(upper), compensate);
    at::Tensor errors = at::zeros({width, rows}, at::kFloat);
    float* w = work.data_ptr<float>() + start * rows;
    int8_t* symbols = lean.symbols.data_ptr<int8_t>() + start * rows;
    at::parallel_for(0, ceil_div(rows, kTileRows), 1, [&](int64_t begin, int64_t end) {
      std::vector<std::array<float, kTileRows>> storage(2 * width + 32);
      auto* weights = reinterpret_cast<float(*)[kTileRows]>(storage.data());
      auto *error = weights + width, *target = error + width, *values = target + 16;
      int8_t chosen[16][kTileRows];
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first_row = t * kTileRows;
        const int lanes = static_cast<int>(std::min<int64_t>(kTileRows, rows - first_row));
        load_tile(w + first_row, rows, width, lanes, weights);

        const auto choose = [&](size_t g, const float* scale) {  // fills target, chosen and values
          const ColumnGroup& group = groups[g];
          apply_matrix(group.metric_f.data(), weights + group.first, group.width, target);
          if (group.table) {
            best_codes(*group.table, target, scale, group.width, chosen);
          } else {
            for (int c = 0; c < group.width; ++c) std::fill_n(chosen[c], kTileRows, int8_t{0});
            improve_codes_locally(lean.nm, lean.level_values, group.metric.data(), target, scale, group.width,
                                  lanes, chosen);
          }
          dequantize(chosen, lean.level_values, scale, group.width, values);
        };

        // The block's scale on its current weights: codes and scale in turn, without feedback, from the mean
        // kept magnitude.
        alignas(64) float scale[kTileRows], top[kTileRows] = {}, bottom[kTileRows];
        int kept = 0;
        for (const ColumnGroup& group : groups) {
          add_largest(weights + group.first, group.width, lean.nm.keep, top);
          kept += std::min(lean.nm.keep, group.width);
        }
        for (int lane = 0; lane < kTileRows; ++lane)
          scale[lane] = std::max(top[lane] / (static_cast<float>(kept) * mean_level), kSmallestScale);
        for (int search = 1; search < kEncodeSearches; ++search) {
          std::fill_n(top, kTileRows, 0.f);
          std::fill_n(bottom, kTileRows, 0.f);
          for (size_t g = 0; g < groups.size(); ++g) {
            const ColumnGroup& group = groups[g];
            choose(g, scale);
            add_dot(values, target, group.width, top);
            apply_matrix(group.metric_f.data(), values, group.width, target);
            add_dot(values, target, group.width, bottom);
          }
          for (int lane = 0; lane < lanes; ++lane)
            if (bottom[lane] > 0 && top[lane] > 0)
              scale[lane] = std::max(scale[lane] * (top[lane] / bottom[lane]), kSmallestScale);
        }
        for (int lane = 0; lane < lanes; ++lane)
          scale[lane] = lean.set_scale(b, first_row + lane, scale[lane]);

        for (size_t g = 0; g < groups.size(); ++g) {
          const ColumnGroup& group = groups[g];
          choose(g, scale);
          subtract(weights + group.first, values, group.width, target);
          apply_matrix(group.transposed.data(), target, group.width, error + group.first);
          if (compensate == Compensate::kColumn)
            push_error(u + (start + group.first) * stride + start, stride, group.width,
                       group.first + group.width, width, error + group.first, weights);
          store_tile(chosen, group.width, lanes, symbols + group.first * rows + first_row, rows);
        }
        store_tile(error, width, lanes, errors.data_ptr<float>() + first_row, rows);
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
