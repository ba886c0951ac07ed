// Coordinate descent over group codes. With G = H D (all other groups fixed), group g with content q costs
//   q^T H_gg q - 2 q^T b + const,   b = H_gg q_old - G_g,
// so the search of encode_columns serves again with metric H_gg. Twin: tests/quantize try every code of every
// group.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "column_groups.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/lanes.h"
#include "stbllm/base/profile.h"
#include "stbllm/quantize/tensor_search.h"

namespace stbllm {
namespace {

/// target = H_gg q - G_g
STBLLM_CLONES void make_target(const float* hessian, int64_t stride, int width, const float (*q)[kTileRows],
                               const float (*gradient)[kTileRows], float (*target)[kTileRows]) {
  for (int i = 0; i < width; ++i) {
    for (int lane = 0; lane < kTileRows; ++lane) target[i][lane] = -gradient[i][lane];
    for (int j = 0; j < width; ++j)
      for (int lane = 0; lane < kTileRows; ++lane) target[i][lane] += hessian[i * stride + j] * q[j][lane];
  }
}

/// q = values, delta = by how much it changed. Returns whether anything did.
STBLLM_CLONES bool change_values(const float (*values)[kTileRows], int width, float (*q)[kTileRows],
                                 float (*delta)[kTileRows]) {
  int any = 0;
  for (int c = 0; c < width; ++c)
    for (int lane = 0; lane < kTileRows; ++lane) {
      delta[c][lane] = values[c][lane] - q[c][lane];
      any |= delta[c][lane] != 0;
      q[c][lane] = values[c][lane];
    }
  return any != 0;
}

/// Puts `chosen` in place of `lanes` rows of symbols, columns `stride` apart. Returns how many differ.
STBLLM_CLONES int64_t replace_symbols(const int8_t (*chosen)[kTileRows], int width, int lanes,
                                      int8_t* symbols, int64_t stride) {
  int changes = 0;
  for (int c = 0; c < width; ++c)
    for (int lane = 0; lane < lanes; ++lane) {
      changes += symbols[c * stride + lane] != chosen[c][lane];
      symbols[c * stride + lane] = chosen[c][lane];
    }
  return changes;
}

/// gradient[c] += sum_k delta[k] H[k][c] over the columns of the block that are still to come
STBLLM_CLONES void add_change(const float* hessian, int64_t stride, int width, int begin, int end,
                              const float (*delta)[kTileRows], float (*gradient)[kTileRows]) {
  for (int c = begin; c < end; ++c)
    for (int k = 0; k < width; ++k) {
      const float factor = hessian[k * stride + c];
      for (int lane = 0; lane < kTileRows; ++lane) gradient[c][lane] += delta[k][lane] * factor;
    }
}

}  // namespace

double descend(LeanWeight& lean) {
  if (!lean.target.is_cpu()) return by_tensors::descend(lean);
  const int64_t rows = lean.rows(), cols = lean.cols();
  const int levels = static_cast<int>(lean.level_values.size());
  const GroupCodebooks codebooks(lean.nm, levels, cols);
  at::Tensor dense = lean.dense();
  at::Tensor gradient = [&] {
    const StageTimer timer("products", 2.0 * static_cast<double>(cols * cols) * static_cast<double>(rows));
    return lean.hessian.mm(dense - lean.target);
  }();
  const float* h = lean.hessian.data_ptr<float>();
  std::atomic<int64_t> changed{0};

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const int64_t start = block.start, rest = block.rest;
    const int width = static_cast<int>(block.width);
    const std::vector<ColumnGroup> groups =
        groups_by_hessian(lean, codebooks, block, block.host_part(lean.hessian));
    at::Tensor change = at::zeros({width, rows}, at::kFloat);
    const float* q = dense.data_ptr<float>() + start * rows;
    const float* g = gradient.data_ptr<float>() + start * rows;
    const float* scales = lean.scales.data_ptr<float>() + b * rows;
    int8_t* symbols = lean.symbols.data_ptr<int8_t>() + start * rows;
    at::parallel_for(0, ceil_div(rows, kTileRows), 1, [&](int64_t begin, int64_t end) {
      std::vector<std::array<float, kTileRows>> storage(2 * width + 32);
      auto* value = reinterpret_cast<float(*)[kTileRows]>(storage.data());
      auto* slope = value + width;
      auto* target = slope + width;
      auto* delta = target + 16;
      int8_t chosen[16][kTileRows];
      int64_t local_changes = 0;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t first_row = t * kTileRows;
        const int lanes = static_cast<int>(std::min<int64_t>(kTileRows, rows - first_row));
        alignas(64) float scale[kTileRows];
        for (int lane = 0; lane < kTileRows; ++lane)
          scale[lane] = lane < lanes ? scales[first_row + lane] : 1.f;
        load_tile(q + first_row, rows, width, lanes, value);
        load_tile(g + first_row, rows, width, lanes, slope);
        for (const ColumnGroup& group : groups) {
          const int first = group.first, w = group.width;
          make_target(h + (start + first) * cols + start + first, cols, w, value + first, slope + first,
                      target);
          if (group.table) {
            best_codes(*group.table, target, scale, w, chosen);
          } else {
            for (int c = 0; c < w; ++c)
              for (int lane = 0; lane < kTileRows; ++lane)
                chosen[c][lane] = lane < lanes ? symbols[(first + c) * rows + first_row + lane] : int8_t{0};
            improve_codes_locally(lean.nm, lean.level_values, group.metric.data(), target, scale, w, lanes,
                                  chosen);
          }
          dequantize(chosen, lean.level_values, scale, w, target);
          if (!change_values(target, w, value + first, delta)) continue;
          local_changes += replace_symbols(chosen, w, lanes, symbols + first * rows + first_row, rows);
          add_change(h + (start + first) * cols + start, cols, w, first + w, width, delta, slope);
          store_tile(delta, w, lanes, change.data_ptr<float>() + first * rows + first_row, rows);
        }
      }
      changed += local_changes;
    });
    if (rest > 0) {
      const StageTimer timer("products", 2.0 * static_cast<double>(rest * width * rows));
      gradient.narrow(0, start + width, rest)
          .addmm_(lean.hessian.narrow(0, start + width, rest).narrow(1, start, width), change);
    }
  }
  return static_cast<double>(changed) / static_cast<double>(rows * cols);
}

}  // namespace stbllm
