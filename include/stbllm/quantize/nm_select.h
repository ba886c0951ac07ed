#pragma once
// Which weights are worth keeping, and the N:M mask that follows.

#include <ATen/ATen.h>

#include "stbllm/quantize/recipe.h"

namespace stbllm {

/// Importance of each weight, transposed like the weights.
/// weight_t: (cols, rows) float32; norm_sq: (cols) S_j^2; inverse_diag: (cols) d_j, diagonal of the upper factor of H^-1.
at::Tensor importance(const at::Tensor& weight_t, const at::Tensor& norm_sq, const at::Tensor& inverse_diag, Importance metric);

/// 1 for the N most important weights of each group of M consecutive columns, 0 elsewhere; ties go to the lower column.
/// A last group of fewer than M columns keeps min(N, columns). score_t: (cols, rows) float32 -> uint8 (cols, rows).
at::Tensor nm_mask(const at::Tensor& score_t, NmPattern nm);

}  // namespace stbllm
