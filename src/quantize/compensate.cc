#include "stbllm/quantize/compensate.h"

#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {

namespace {

/// The factor of a positive definite `h`, or an undefined tensor when a Cholesky fails.
at::Tensor factor_in_three_steps(const at::Tensor& h) {
  const auto [lower, info] = at::linalg_cholesky_ex(h);
  if (info.item<int>() != 0) return {};
  const auto [upper, second_info] = at::linalg_cholesky_ex(at::cholesky_inverse(lower), /*upper=*/true);
  return second_info.item<int>() != 0 ? at::Tensor() : upper;
}

/// With J the reversal of rows, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and H^-1 = U^T U for U = R^-1.
at::Tensor factor_in_one_step(const at::Tensor& h) {
  const at::Tensor reverse = at::arange(h.size(0) - 1, -1, -1, at::kLong);
  const auto [lower, info] = at::linalg_cholesky_ex(h.to(at::kDouble).index_select(0, reverse).index_select(1, reverse));
  if (info.item<int>() != 0) return {};
  const at::Tensor inverse = at::linalg_solve_triangular(lower, at::eye(h.size(0), at::kDouble), /*upper=*/false);
  return inverse.index_select(0, reverse).index_select(1, reverse).to(at::kFloat);
}

}  // namespace

InverseFactor inverse_factor(const at::Tensor& hessian, double damping, bool three_steps) {
  if (!hessian.isfinite().all().item<bool>())
    fail(ErrorCode::kCorrupt,
         "the Hessian of the inputs holds values that are not finite; the checkpoint's activations overflow: check its weights");
  const at::Tensor diagonal = hessian.diagonal();
  const at::Tensor dead = diagonal.eq(0).to(at::kFloat);
  const double mean = diagonal.mean().item<double>();
  constexpr int kMaxRetries = 5;
  for (int retries = 0;; ++retries, damping = damping > 0 ? 10 * damping : 1e-4) {
    at::Tensor h = hessian.clone();
    h.diagonal().add_(dead).add_(damping * mean);
    const at::Tensor upper = three_steps ? factor_in_three_steps(h) : factor_in_one_step(h);
    if (upper.defined() && upper.isfinite().all().item<bool>()) return {upper.contiguous(), damping, retries};
    if (retries == kMaxRetries)
      fail(ErrorCode::kCorrupt, "the Hessian of the inputs is not positive definite even with damping {:g}; use more calibration text", damping);
    log::debug("the Cholesky of a Hessian failed with damping {:g}; trying again with more", damping);
  }
}

}  // namespace stbllm
