#pragma once
// What a matrix becomes in device memory (device_layout.h), decided on the host from its layout and its
// largest scale. Pure arithmetic: the backend and the harness tests fill in the pointers.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "device_layout.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/scale_codes.h"
#include "stbllm/pack/structured_binary_matrix.h"

namespace stbllm::cuda {

struct Plan {
  WeightView weights{};                // no pointers yet
  PlaneView planes{};                  // no pointers yet
  std::vector<int32_t> extra_columns;  ///< WeightView::extra_columns
  std::vector<uint8_t> taken;          ///< WeightView::taken

  int64_t record_words() const {
    return int64_t{weights.row_tiles} * weights.column_tiles * weights.record_words;
  }
  int64_t extra_words() const { return int64_t{weights.row_tiles} * weights.extra_steps * 128; }
  /// Device bytes of the prepared matrix.
  int64_t bytes() const {
    return 4 * (record_words() + extra_words()) + 4 * std::ssize(extra_columns) + std::ssize(taken);
  }
};

/// Sparse tiles where no four columns can keep more than two; see device_layout.h.
inline TileFormat choose_format(const Layout& layout) {
  const NmPattern nm = layout.nm;
  const bool sparse = nm.keep <= 2;
  const bool needs_zero = sparse ? nm != NmPattern{2, 4} : nm.keep != nm.group;
  return {sparse, bits_for(static_cast<uint64_t>(layout.levels + (needs_zero ? 1 : 0)))};
}

namespace detail {

inline float largest_half(std::span<const std::byte> plane) {
  float largest = 0.0f;
  for (size_t i = 0; i < plane.size(); i += 2) {
    uint16_t bits;
    std::memcpy(&bits, plane.data() + i, 2);
    largest = std::max(largest, std::abs(half_to_float(bits)));
  }
  return largest;
}

}  // namespace detail

inline Plan plan_matrix(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  Plan plan;
  WeightView& weights = plan.weights;
  PlaneView& planes = plan.planes;

  planes.rows = weights.rows = static_cast<int>(layout.rows);
  planes.cols = weights.cols = static_cast<int>(layout.cols);
  planes.keep = layout.nm.keep;
  planes.group = layout.nm.group;
  planes.levels = weights.levels = layout.levels;
  planes.column_block = weights.column_block = layout.column_block;
  planes.column_blocks = static_cast<int>(layout.column_blocks());
  planes.scale_slots = layout.scale_slots();
  planes.scale_bits = layout.scale_bits;
  planes.code_bits = layout.code_bits();
  planes.code_row_bytes = layout.code_row_bytes();
  planes.scale_code_row_bytes = layout.scale_code_row_bytes();
  planes.salient = static_cast<int>(layout.salient);
  planes.outliers = static_cast<int>(layout.outliers);
  if (layout.scale_bits < 16)
    for (int code = 0; code < 1 << layout.scale_bits; ++code)
      planes.scale_factors[code] = scale_code_factors(layout.scale_bits)[code];

  // Kernels count columns in int; the last block needs no padding beyond its own columns.
  const int64_t padded_block = ceil_div(layout.column_block, kScaleColumns) * kScaleColumns;
  const int64_t last_block = layout.cols - (layout.column_blocks() - 1) * layout.column_block;
  const int64_t columns = (layout.column_blocks() - 1) * padded_block + last_block;
  if (columns > std::numeric_limits<int>::max() / 2)
    fail(ErrorCode::kUnsupported,
         "the cuda backend cannot hold {} columns in column blocks of {}; use the cpu backend", layout.cols,
         layout.column_block);
  weights.padded_column_block = static_cast<int>(padded_block);
  weights.row_tiles = static_cast<int>(ceil_div(layout.rows, kTileRows));
  weights.column_tiles = static_cast<int>(ceil_div(columns, kTileColumns));
  weights.format = choose_format(layout);
  weights.record_words = 32 * weights.format.lane_words() + 16 * layout.levels;

  const int64_t extra = layout.outliers + layout.salient;
  weights.extra_steps = static_cast<int>(ceil_div(extra, kExtraColumns));
  if (extra > 0) {
    plan.extra_columns.assign(static_cast<size_t>(weights.extra_steps) * kExtraColumns, -1);
    std::ranges::copy(matrix.salient_columns(),
                      std::ranges::copy(matrix.outlier_columns(), plan.extra_columns.begin()).out);
    plan.taken.resize(static_cast<size_t>(weights.column_tiles) * kTileColumns / 8);
    for (int64_t i = 0; i < extra; ++i) {
      const int source = plan.extra_columns[i], block = source / layout.column_block;
      const int column = block * weights.padded_column_block + source % layout.column_block;
      plan.taken[column / 8] |= static_cast<uint8_t>(1 << (column % 8));
    }
  }

  float largest = detail::largest_half(matrix.plane(Plane::kScales));
  if (layout.scale_bits < 16)  // the factor of code 0 is 1
    largest = detail::largest_half(matrix.plane(Plane::kRowScales)) *
              detail::largest_half(matrix.plane(Plane::kLevels));
  if (layout.salient > 0) largest *= 2.0f;  // the sum of two scales
  largest = std::max(largest, detail::largest_half(matrix.plane(Plane::kOutlierValues)));
  const int exponent = largest > 0.0f ? std::ilogb(largest) - 13 : 0;
  weights.scale = std::ldexp(1.0f, exponent);
  planes.inverse_scale = std::ldexp(1.0f, -exponent);
  return plan;
}

/// How `data` (tokens, cols) may be read; see InputView::aligned.
inline InputView view_input(const WeightView& weights, const void* data, ElementType type, int64_t tokens) {
  const bool same_columns =
      weights.padded_column_block == weights.column_block || weights.cols <= weights.column_block;
  const int64_t row_bytes = int64_t{weights.cols} * (type == ElementType::kFloat32 ? 4 : 2);
  const bool aligned = same_columns && reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_bytes % 16 == 0;
  return {data, type, static_cast<int>(tokens), aligned};
}

}  // namespace stbllm::cuda
