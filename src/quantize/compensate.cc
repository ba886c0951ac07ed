#include "stbllm/quantize/compensate.h"

#include <cmath>

#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {

namespace {

/// A sum in float64 of float32 values that are finite is finite.
bool is_finite(const at::Tensor& x) { return std::isfinite(x.sum(at::kDouble).item<double>()); }

/// The factor of a positive definite `h`, or an undefined tensor when a Cholesky fails.
at::Tensor factor_in_three_steps(const at::Tensor& h) {
  const auto [lower, info] = at::linalg_cholesky_ex(h);
  if (info.item<int>() != 0) return {};
  const auto [upper, second_info] = at::linalg_cholesky_ex(at::cholesky_inverse(lower), /*upper=*/true);
  return second_info.item<int>() != 0 ? at::Tensor() : upper;
}

/// The inverse of a lower triangle, by halves: [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1], so that most of it is products.
at::Tensor inverse_of_lower(const at::Tensor& lower) {
  constexpr int64_t kWhole = 192;
  const int64_t size = lower.size(0), half = (size + 1) / 2, rest = size - half;
  if (size <= kWhole) return at::linalg_solve_triangular(lower, at::eye(size, lower.options()), /*upper=*/false);
  const at::Tensor first = inverse_of_lower(lower.narrow(0, 0, half).narrow(1, 0, half));
  const at::Tensor last = inverse_of_lower(lower.narrow(0, half, rest).narrow(1, half, rest));
  at::Tensor inverse = at::zeros_like(lower);
  inverse.narrow(0, 0, half).narrow(1, 0, half).copy_(first);
  inverse.narrow(0, half, rest).narrow(1, half, rest).copy_(last);
  inverse.narrow(0, half, rest).narrow(1, 0, half).copy_(last.mm(lower.narrow(0, half, rest).narrow(1, 0, half).mm(first)).neg_());
  return inverse;
}

/// With J the reversal of rows, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and H^-1 = U^T U for U = R^-1.
at::Tensor factor_in_one_step(const at::Tensor& h) {
  const auto [lower, info] = at::linalg_cholesky_ex(h.flip({0, 1}).to(at::kDouble));
  if (info.item<int>() != 0) return {};
  return inverse_of_lower(lower).to(at::kFloat).flip({0, 1});
}

}  // namespace

InverseFactor inverse_factor(const at::Tensor& hessian, double damping, bool three_steps) {
  if (!is_finite(hessian))
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
    if (upper.defined() && is_finite(upper)) return {upper.contiguous(), damping, retries};
    if (retries == kMaxRetries)
      fail(ErrorCode::kCorrupt, "the Hessian of the inputs is not positive definite even with damping {:g}; use more calibration text", damping);
    log::debug("the Cholesky of a Hessian failed with damping {:g}; trying again with more", damping);
  }
}

}  // namespace stbllm
