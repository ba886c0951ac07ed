#pragma once
// Binarization of a set of weights of one row, order k (BiLLM eq. 4-6, STBLLM section 3.4):
//
//   repeat k times:  m = mean(residual) (or 0),  a = mean |residual - m|,  residual -= m + a sign(residual -
//   m)
//
// and the two searches that decide which set a weight belongs to.

#include <ATen/ATen.h>

#include <vector>

#include "stbllm/quantize/method.h"

namespace stbllm {

/// One column block, transposed: everything is (cols of the block, rows).
struct ColumnBlock {
  at::Tensor values;  ///< float32: the matrix that is searched and binarized
  at::Tensor kept;    ///< uint8: 1 = takes part
  at::Tensor weight;  ///< float32 (cols of the block): factor of a column's squared error
};

/// The sets of a column block: 0 = not kept, 1..levels = region by magnitude (1 = dense, the smallest), 4 =
/// salient column.
inline constexpr uint8_t kSalientSet = 4;

/// Tries the first 0 (or 1, in the released code) .. `max_count` columns of `order` as salient ones,
/// binarized with order 2, the rest with order `rest_order`, and returns the count with the smallest weighted
/// squared error.
int search_salient(const ColumnBlock& block, const std::vector<int64_t>& order, int min_count, int max_count,
                   int rest_order, bool means);

/// Tries each p1 of `thresholds` (ascending) with p2 = 2 p1 (levels == 3) or a single split (levels == 2) on
/// the columns that are not salient and returns the p1 with the smallest weighted squared error. With
/// `upper_quantile_rule`, p1 with 2 p1 above the last threshold is skipped.
float search_regions(const ColumnBlock& block, const std::vector<uint8_t>& salient,
                     const std::vector<float>& thresholds, int levels, bool means, bool upper_quantile_rule);

/// The sets that `p1` and the salient columns make; uint8 (cols of the block, rows).
at::Tensor assign_sets(const ColumnBlock& block, const std::vector<uint8_t>& salient, float p1, int levels);

/// What binarizing each set gives. `scale` and `mean`: (rows, slots) with slots = levels + 2, the last two
/// for the salient set's first and second order; means are zero unless asked for. `sign` and `residual_sign`:
/// int8 (cols of the block, rows).
struct BinarizedBlock {
  at::Tensor scale, mean, sign, residual_sign;

  /// The binarized values, float32 (cols of the block, rows).
  at::Tensor dequantize(const at::Tensor& sets, int levels) const;
};
BinarizedBlock binarize_sets(const at::Tensor& values, const at::Tensor& sets, int levels, bool means);

}  // namespace stbllm
