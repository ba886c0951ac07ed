#pragma once
// Which weights are worth keeping, and the N:M mask that follows.

#include <ATen/ATen.h>

#include "stbllm/base/nm_pattern.h"
#include "stbllm/quantize/method.h"

namespace stbllm {

/// Importance of the weights of a linear, transposed like them.
class ImportanceScore {
 public:
  /// weight_t: (cols, rows) float32, the whole linear: sums over a row, mean and deviation are its.
  ImportanceScore(const at::Tensor& weight_t, Importance metric);
  /// Of some columns of the linear, whose weights may have changed since. columns_t: (columns, rows) float32;
  /// norm_sq: (columns) S_j^2; inverse_diag: (columns) d_j, diagonal of the upper factor of H^-1. Returns
  /// (columns, rows) float32.
  at::Tensor operator()(const at::Tensor& columns_t, const at::Tensor& norm_sq,
                        const at::Tensor& inverse_diag) const;

 private:
  /// Row- plus column-normalised magnitude (STBLLM's mu); an all-zero row or column counts as zero.
  at::Tensor relative_magnitude(const at::Tensor& columns_t) const;

  Importance metric_;
  at::Tensor row_sum_;           // (1, rows)
  at::Tensor mean_, deviation_;  // of mu over the linear, float64
};

/// 1 for the N most important weights of each group of M consecutive columns, 0 elsewhere; ties go to the
/// lower column. A last group of fewer than M columns keeps min(N, columns). score_t: (cols, rows) float32 ->
/// uint8 (cols, rows).
at::Tensor nm_mask(const at::Tensor& score_t, NmPattern nm);

}  // namespace stbllm
