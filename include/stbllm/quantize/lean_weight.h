#pragma once
// A linear in the lean code while it is being optimised: one scale per row and column block, level values
// shared by the whole matrix, one symbol per weight. Three steps work on it: encode_columns (first codes,
// with error feedback), refit (all scales and levels given the codes) and descend (all codes given the
// scales).
//
// All of them minimise  tr(D H D^T),  D = Q - W.  Matrices are transposed, (cols, rows): rows are the vector
// lanes.

#include <ATen/ATen.h>

#include <span>
#include <vector>

#include "stbllm/base/bits.h"
#include "stbllm/base/nm_pattern.h"
#include "stbllm/quantize/group_search.h"
#include "stbllm/quantize/method.h"

namespace stbllm {

struct LeanWeight {
  NmPattern nm;
  int column_block = 128;
  int scale_bits = 16;

  // Products run where these four are; all else is in host memory.
  at::Tensor target;   ///< float32 (cols, rows): W; zero in columns that are stored exactly
  at::Tensor hessian;  ///< float32 (cols, cols): H, shrunk; rows and columns of outlier columns are zero
  at::Tensor hessian_target;  ///< float32 (cols, rows): H W; refit makes it when it is first needed
  at::Tensor symbols;         ///< int8 (cols, rows): 0 or +-(1 + level)

  at::Tensor scales;                ///< float32 (column blocks, rows): representable values, > 0
  at::Tensor scale_codes;           ///< uint8 (column blocks, rows)    when scale_bits < 16
  at::Tensor row_scales;            ///< float32 (rows), fp16 values    when scale_bits < 16
  std::vector<float> level_values;  ///< fp16 values; {1} when scale_bits == 16

  int64_t cols() const { return target.size(0); }
  int64_t rows() const { return target.size(1); }
  int64_t column_blocks() const { return ceil_div(cols(), column_block); }

  /// Q, float32 (cols, rows).
  at::Tensor dense() const;
  /// Gives a row the scale nearest to `wanted` (> 0) in a column block; returns it.
  float set_scale(int64_t block, int64_t row, float wanted);
  /// tr(D H D^T).
  double error() const;
};

/// The smallest scale: an fp16 value well above the smallest one.
inline constexpr float kSmallestScale = 0x1p-20f;

/// The scale nearest to `wanted` (> 0) that the coding can represent, given the row's base; sets the code.
float representable_scale(int scale_bits, float row_scale, float wanted, uint8_t& code);

/// Symbols as 0 or +- level value: float32 of the same shape, where `symbols` are.
at::Tensor unit_values(const at::Tensor& symbols, std::span<const float> level_values);

/// First level values and scales from the weights alone (a Lloyd iteration on |w| over the row block's
/// scale), and no symbols. `target` in host memory.
void initialize_scales(LeanWeight& lean, int levels, const at::Tensor& column_weight);

// The three steps. Where `target` is on a device they are those of tensor_search.h.

/// How often encode_columns searches each group: twice for the scale of its column block, then for good.
inline constexpr int kEncodeSearches = 3;

/// Codes from left to right; the error of each group is pushed into later columns through `upper`
/// (InverseFactor::upper; not used with Compensate::kNone).
void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate);

/// Least squares for all scales of a row at once, then, `with_levels`, for the levels (at the price of as
/// many products as there are levels), rounded to representable values by coordinate descent. error() never
/// rises (beyond float32 rounding of the sums).
void refit(LeanWeight& lean, bool with_levels = true);

/// One sweep over all groups: each takes the code with the smallest error given all others. error() never
/// rises. Returns the share of weights whose symbol changed.
double descend(LeanWeight& lean);

}  // namespace stbllm
