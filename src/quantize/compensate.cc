#include "stbllm/quantize/compensate.h"

#include <cmath>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/base/profile.h"

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

/// Puts the inverse of a lower triangle in its place, by halves: [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1],
/// so that most of it is products.
void invert_lower(at::Tensor lower) {
  constexpr int64_t kWhole = 192;
  const int64_t size = lower.size(0), half = (size + 1) / 2, rest = size - half;
  if (size <= kWhole) {
    lower.copy_(at::linalg_solve_triangular(lower, at::eye(size, lower.options()), /*upper=*/false));
    return;
  }
  const at::Tensor first = lower.narrow(0, 0, half).narrow(1, 0, half),
                   last = lower.narrow(0, half, rest).narrow(1, half, rest);
  const at::Tensor below = lower.narrow(0, half, rest).narrow(1, 0, half);
  invert_lower(first);
  invert_lower(last);
  below.copy_(last.mm(below.mm(first)).neg_());
}

/// With J the reversal of rows, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and H^-1 =
/// U^T U for U = R^-1. Takes at most 16 bytes for each of H's elements, beside H: for LLaMA-2-7B's widest
/// linears these are 2 GB.
at::Tensor factor_in_one_step(at::Tensor h) {
  h = h.flip({0, 1});
  h = h.to(at::kDouble);
  const auto [lower, info] = at::linalg_cholesky_ex(h);
  h.reset();
  if (info.item<int>() != 0) return {};
  invert_lower(lower);
  return lower.to(at::kFloat).flip({0, 1});
}

}  // namespace

at::Tensor shrink_hessian(const at::Tensor& hessian, double s) {
  at::Tensor h = hessian * (1 - s);
  h.diagonal().copy_(hessian.diagonal());
  return h;
}

InverseFactor inverse_factor(const at::Tensor& hessian, double damping, bool three_steps) {
  // A Cholesky and the inverse of a triangle, or an inverse of the whole between two of them.
  const StageTimer timer("factor",
                         (three_steps ? 4. : 2.) / 3 * std::pow(static_cast<double>(hessian.size(0)), 3));
  if (!is_finite(hessian))
    fail(ErrorCode::kCorrupt,
         "the Hessian of the inputs holds values that are not finite; the checkpoint's activations overflow: "
         "check its weights");
  const at::Tensor diagonal = hessian.diagonal();
  const at::Tensor dead = diagonal.eq(0).to(at::kFloat);
  const double mean = diagonal.mean().item<double>();
  constexpr int kMaxRetries = 5;
  for (int retries = 0;; ++retries, damping = damping > 0 ? 10 * damping : 1e-4) {
    at::Tensor h = hessian.clone();
    h.diagonal().add_(dead).add_(damping * mean);
    const at::Tensor upper = three_steps ? factor_in_three_steps(h) : factor_in_one_step(std::move(h));
    if (upper.defined() && is_finite(upper)) return {upper.contiguous(), damping, retries};
    if (retries == kMaxRetries)
      fail(ErrorCode::kCorrupt,
           "the Hessian of the inputs is not positive definite even with damping {:g}; use more calibration "
           "text",
           damping);
    log::debug("the Cholesky of a Hessian failed with damping {:g}; trying again with more", damping);
  }
}

}  // namespace stbllm
