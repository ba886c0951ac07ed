#pragma once
// The groups of a column block with what a search needs of each, in host memory: shared by the loops over
// lanes and by_tensors.

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "stbllm/quantize/lean_weight.h"

namespace stbllm {

struct ColumnGroup {
  int first, width;                   // columns within the column block
  std::array<double, 256> metric{};   // (width, width): what the error of a group is measured in
  std::array<float, 256> metric_f{};  // the same; by factor only, like U_gg^-T:
  std::array<float, 256> transposed{};
  std::optional<GroupTable> table;  // where the states are enumerated
};

/// A column block, and its part (width, width) of a matrix over columns, in host memory and contiguous.
struct BlockColumns {
  int64_t start, width, rest;  // rest: columns behind it
  BlockColumns(const LeanWeight& lean, int64_t block)
      : start(block * lean.column_block),
        width(std::min<int64_t>(lean.column_block, lean.cols() - start)),
        rest(lean.cols() - start - width) {}
  at::Tensor host_part(const at::Tensor& matrix) const {
    return matrix.narrow(0, start, width).narrow(1, start, width).cpu().contiguous();
  }
};

/// Metrics U_gg^-1 U_gg^-T of encode_columns, from the block's part of U: of its diagonal alone unless
/// `compensate` is kColumn, of none (it may be undefined) with kNone.
std::vector<ColumnGroup> groups_by_factor(const LeanWeight& lean, const GroupCodebooks& codebooks,
                                          const BlockColumns& block, const at::Tensor& factor,
                                          Compensate compensate);

/// Metrics H_gg of descend, from the block's part of H.
std::vector<ColumnGroup> groups_by_hessian(const LeanWeight& lean, const GroupCodebooks& codebooks,
                                           const BlockColumns& block, const at::Tensor& hessian);

// Tiles of `lanes` rows, columns `stride` apart in memory.

/// Zeros behind the last row.
inline void load_tile(const float* from, int64_t stride, int width, int lanes, float (*to)[kTileRows]) {
  for (int c = 0; c < width; ++c)
    std::fill(std::copy_n(from + c * stride, lanes, to[c]), to[c] + kTileRows, 0.f);
}
template <typename T>
void store_tile(const T (*from)[kTileRows], int width, int lanes, T* to, int64_t stride) {
  for (int c = 0; c < width; ++c) std::copy_n(from[c], lanes, to + c * stride);
}

}  // namespace stbllm
