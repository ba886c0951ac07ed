#pragma once
// The triangular factor through which the error of a column is pushed into later ones (GPTQ, OBQ).

#include <ATen/ATen.h>

namespace stbllm {

/// (1 - s) H + s diag(H): sums over few tokens overstate what columns have in common.
at::Tensor shrink_hessian(const at::Tensor& hessian, double s);

struct InverseFactor {
  at::Tensor upper;  ///< U (cols, cols) float32, upper triangular, H^-1 = U^T U; d_j = U_jj
  double damping;    ///< the share of mean(diag H) that was added to the diagonal
  int retries;       ///< how often it had to be raised tenfold before the Cholesky went through
};

/// hessian: (cols, cols). `three_steps`: Cholesky, inverse, Cholesky in float32 as GPTQ and the released
/// STBLLM do it, whose rounding decides ties between equal weights; otherwise one Cholesky and one triangular
/// inverse in float64. Columns with H_jj = 0 get H_jj = 1. Throws Error(kCorrupt) when H has values that are
/// not finite.
InverseFactor inverse_factor(const at::Tensor& hessian, double damping, bool three_steps = false);

}  // namespace stbllm
