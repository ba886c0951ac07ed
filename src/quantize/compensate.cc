#include "stbllm/quantize/compensate.h"

#include <cmath>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
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

/// Puts L^-1 in the place of the symmetric `h` = L L^T, L lower triangular, and says whether there is one. By
/// halves, so that most of it is products, and an interrupt is answered between them:
///   [A B^T; B C] = L L^T with L = [L_A 0; M L_C], L_A L_A^T = A, M = B L_A^-T, L_C L_C^T = C - M M^T,
///   and L^-1 = [L_A^-1 0; -L_C^-1 M L_A^-1 L_C^-1].
bool invert_cholesky(const at::Tensor& h) {
  check_interrupt();
  constexpr int64_t kWhole = 512;
  const int64_t size = h.size(0), half = (size + 1) / 2, rest = size - half;
  if (size <= kWhole) {
    const auto [lower, info] = at::linalg_cholesky_ex(h);
    if (info.item<int>() != 0) return false;
    h.copy_(at::linalg_solve_triangular(lower, at::eye(size, h.options()), /*upper=*/false));
    return true;
  }
  const at::Tensor first = h.narrow(0, 0, half).narrow(1, 0, half),
                   below = h.narrow(0, half, rest).narrow(1, 0, half),
                   last = h.narrow(0, half, rest).narrow(1, half, rest);
  if (!invert_cholesky(first)) return false;
  below.copy_(below.mm(first.t()));
  last.addmm_(below, below.t(), 1, -1);
  if (!invert_cholesky(last)) return false;
  below.copy_(last.mm(below.mm(first)).neg_());
  h.narrow(0, 0, half).narrow(1, half, rest).zero_();
  return true;
}

/// With J the reversal of rows, J H J = L L^T gives H = R R^T for the upper triangular R = J L J, and H^-1 =
/// U^T U for U = R^-1. Takes at most 16 bytes for each of H's elements, beside H: for LLaMA-2-7B's widest
/// linears these are 2 GB.
at::Tensor factor_in_one_step(at::Tensor h) {
  h = h.flip({0, 1});
  h = h.to(at::kDouble);
  if (!invert_cholesky(h)) return {};
  return h.to(at::kFloat).flip({0, 1});
}

}  // namespace

at::Tensor shrink_hessian(const at::Tensor& hessian, double s) {
  at::Tensor h = hessian * (1 - s);
  h.diagonal().copy_(hessian.diagonal());
  return h;
}

InverseFactor inverse_factor(const at::Tensor& hessian, double damping, bool three_steps) {
  // A Cholesky and the inverse of a triangle, or an inverse of the whole between two of them; products of
  // triangles that are taken as whole matrices do not count.
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
