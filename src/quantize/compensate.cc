#include "stbllm/quantize/compensate.h"

#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {

InverseFactor inverse_factor(const at::Tensor& hessian, double damping) {
  if (!hessian.isfinite().all().item<bool>())
    fail(ErrorCode::kCorrupt,
         "the Hessian of the inputs holds values that are not finite; the checkpoint's activations overflow: check its weights");
  const at::Tensor diagonal = hessian.diagonal();
  const double mean = diagonal.mean().item<double>();
  const at::Tensor dead = diagonal.eq(0).to(at::kFloat);
  const at::Tensor reverse = at::arange(hessian.size(0) - 1, -1, -1, at::kLong);
  for (int retries = 0; retries < 6; ++retries, damping *= 10) {
    at::Tensor h = hessian.clone();
    h.diagonal().add_(dead).add_(damping * mean);
    // With J the reversal, J H J = L L^T gives H = R R^T, R = J L J upper, and H^-1 = R^-T R^-1 = U^T U with U = R^-1:
    // one Cholesky and one triangular inverse instead of GPTQ's Cholesky, inverse, Cholesky.
    const at::Tensor flipped = h.index_select(0, reverse).index_select(1, reverse);
    const auto [lower, info] = at::linalg_cholesky_ex(flipped);
    if (info.item<int>() != 0) {
      log::debug("Cholesky failed with damping {:g}; trying ten times as much", damping);
      continue;
    }
    const at::Tensor inverse = at::linalg_solve_triangular(lower, at::eye(h.size(0), at::kFloat), /*upper=*/false);
    const at::Tensor upper = inverse.index_select(0, reverse).index_select(1, reverse).contiguous();
    if (!upper.isfinite().all().item<bool>()) continue;
    return {upper, damping, retries};
  }
  fail(ErrorCode::kCorrupt, "the Hessian of the inputs is not positive definite even with damping {:g}; use more calibration text", damping);
}

}  // namespace stbllm
