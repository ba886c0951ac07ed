// All scales of a row at once. With v_b the unit values of column block b (zero elsewhere), the error of a row is
//   a^T P a - 2 a^T r + const,   P_bc = v_b^T H v_c,  r_b = v_b^T H w,
// whose minimum is a small solve per row; the levels are the same problem with the roles changed, summed over rows. P is
// symmetric, and H w does not change while a linear is optimised: of each product with H only the part from its own column
// block on is needed.
// Rounding to representable values is coordinate descent on the same quadratic, and a row whose error would rise stays.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"
#include "stbllm/quantize/lanes.h"
#include "stbllm/quantize/lean_weight.h"

namespace stbllm {
namespace {

/// a^T P a - 2 a^T r
double quadratic(const double* p, const double* r, const std::vector<double>& a) {
  const size_t n = a.size();
  double sum = 0;
  for (size_t i = 0; i < n; ++i) {
    double row = 0;
    for (size_t j = 0; j < n; ++j) row += p[i * n + j] * a[j];
    sum += a[i] * (row - 2 * r[i]);
  }
  return sum;
}

/// Terms that a float32 sum takes before it joins a float64 one.
constexpr int64_t kFloatTerms = 128;

/// sums[lane] = sum over `count` columns of a * b, rows side by side and columns `stride` apart.
template <int kWidth>
STBLLM_INLINE void dot_lanes(const float* a, const float* b, int64_t stride, int64_t count, double* sums) {
  for (int lane = 0; lane < kWidth; ++lane) sums[lane] = 0;
  for (int64_t first = 0; first < count; first += kFloatTerms) {
    const int64_t end = std::min(first + kFloatTerms, count);
    float part[kWidth] = {};
    for (int64_t k = first; k < end; ++k)
      for (int lane = 0; lane < kWidth; ++lane) part[lane] += a[k * stride + lane] * b[k * stride + lane];
    for (int lane = 0; lane < kWidth; ++lane) sums[lane] += part[lane];
  }
}
STBLLM_CLONES void dot_tile(const float* a, const float* b, int64_t stride, int64_t count, double* sums) {
  dot_lanes<kTileRows>(a, b, stride, count, sums);
}

/// out[row * out_stride] = sum over columns of a * b, both float32 (columns, rows).
void dot_columns(const at::Tensor& a, const at::Tensor& b, double* out, int64_t out_stride) {
  const int64_t count = a.size(0), rows = a.size(1);
  const float *x = a.const_data_ptr<float>(), *y = b.const_data_ptr<float>();
  at::parallel_for(0, ceil_div(rows, kTileRows), 1, [&](int64_t begin, int64_t end) {
    double sums[kTileRows];
    for (int64_t row = begin * kTileRows; row < std::min(end * kTileRows, rows);) {
      const bool whole = row + kTileRows <= rows;
      if (whole)
        dot_tile(x + row, y + row, rows, count, sums);
      else
        dot_lanes<1>(x + row, y + row, rows, count, sums);
      for (int lane = 0; lane < (whole ? kTileRows : 1); ++lane, ++row) out[row * out_stride] = sums[lane];
    }
  });
}

/// The same summed over rows.
double dot_all(const at::Tensor& a, const at::Tensor& b) {
  std::vector<double> sums(a.size(1));
  dot_columns(a, b, sums.data(), 1);
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

void refit_scales(LeanWeight& lean) {
  const int64_t blocks = lean.column_blocks(), rows = lean.rows(), cols = lean.cols();
  const at::Tensor unit = lean.unit_values();
  at::Tensor p = at::empty({rows, blocks, blocks}, at::kDouble), r = at::empty({rows, blocks}, at::kDouble);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * lean.column_block, width = std::min<int64_t>(lean.column_block, cols - first);
    const at::Tensor own = unit.narrow(0, first, width);
    const at::Tensor product = [&] {  // (cols - first, rows)
      const StageTimer timer("products", 2.0 * static_cast<double>((cols - first) * width) * static_cast<double>(rows));
      return lean.hessian.narrow(0, first, cols - first).narrow(1, first, width).mm(own);
    }();
    dot_columns(own, lean.hessian_target.narrow(0, first, width), r.data_ptr<double>() + b, blocks);
    for (int64_t c = b; c < blocks; ++c) {
      const int64_t from = c * lean.column_block, count = std::min<int64_t>(lean.column_block, cols - from);
      dot_columns(product.narrow(0, from - first, count), unit.narrow(0, from, count), p.data_ptr<double>() + b * blocks + c, blocks * blocks);
      if (c > b) p.select(1, c).select(1, b).copy_(p.select(1, b).select(1, c));
    }
  }
  at::Tensor damped = p.clone();
  damped.diagonal(0, 1, 2).add_(p.diagonal(0, 1, 2).mean(1, true) * 1e-6 + 1e-30);
  const auto [solution, info] = at::linalg_solve_ex(damped, r.unsqueeze(2));
  const at::Tensor solved = solution.squeeze(2).contiguous();
  const bool coded = lean.scale_bits < 16;

  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> old(blocks), now(blocks);
    std::vector<uint8_t> codes(blocks);
    for (int64_t row = begin; row < end; ++row) {
      const double* pr = p.data_ptr<double>() + row * blocks * blocks;
      const double* rr = r.data_ptr<double>() + row * blocks;
      const double* exact = solved.data_ptr<double>() + row * blocks;
      float* scales = lean.scales.data_ptr<float>();
      for (int64_t b = 0; b < blocks; ++b) old[b] = scales[b * rows + row];
      const double before = quadratic(pr, rr, old);

      // Two bases are tried: the largest solved scale, and the one the row has.
      const float current = coded ? lean.row_scales.data_ptr<float>()[row] : 0.f;
      float largest = 0;
      for (int64_t b = 0; b < blocks; ++b)
        if (std::isfinite(exact[b])) largest = std::max(largest, static_cast<float>(exact[b]));
      const float wanted = coded ? half_to_float(float_to_half(std::min(largest, 6e4f))) : 0.f;
      double best = before;
      for (const float base : {wanted, current}) {
        if (coded && base < 1e-6f) continue;
        for (int64_t b = 0; b < blocks; ++b) {
          const float start = std::isfinite(exact[b]) && exact[b] > 0 ? static_cast<float>(exact[b]) : static_cast<float>(old[b]);
          now[b] = representable_scale(lean.scale_bits, base, start, codes[b]);
        }
        for (int sweep = 0; sweep < 3; ++sweep)
          for (int64_t b = 0; b < blocks; ++b) {
            if (pr[b * blocks + b] <= 0) continue;
            double rest = rr[b];
            for (int64_t c = 0; c < blocks; ++c)
              if (c != b) rest -= pr[b * blocks + c] * now[c];
            now[b] = representable_scale(lean.scale_bits, base, static_cast<float>(rest / pr[b * blocks + b]), codes[b]);
          }
        const double after = quadratic(pr, rr, now);
        if (!(after < best)) continue;
        best = after;
        for (int64_t b = 0; b < blocks; ++b) {
          scales[b * rows + row] = static_cast<float>(now[b]);
          if (coded) lean.scale_codes.data_ptr<uint8_t>()[b * rows + row] = codes[b];
        }
        if (coded) lean.row_scales.data_ptr<float>()[row] = base;
      }
    }
  });
}

/// The signed scale of each weight that has this level, else 0: float32 (cols, rows).
at::Tensor scales_of_level(const LeanWeight& lean, int level) {
  const int64_t rows = lean.rows();
  at::Tensor part = at::empty_like(lean.target);
  at::parallel_for(0, lean.cols(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int8_t* symbol = lean.symbols.const_data_ptr<int8_t>() + c * rows;
      const float* scale = lean.scales.const_data_ptr<float>() + c / lean.column_block * rows;
      float* out = part.data_ptr<float>() + c * rows;
      for (int64_t row = 0; row < rows; ++row) out[row] = symbol[row] == 1 + level ? scale[row] : symbol[row] == -1 - level ? -scale[row] : 0.f;
    }
  });
  return part;
}

void refit_levels(LeanWeight& lean) {
  const int levels = static_cast<int>(lean.level_values.size());
  if (levels == 1) return;
  const int64_t cols = lean.cols();
  std::vector<at::Tensor> part(levels), product(levels);
  for (int level = 0; level < levels; ++level) {
    part[level] = scales_of_level(lean, level);
    const StageTimer timer("products", 2.0 * static_cast<double>(cols * cols) * static_cast<double>(lean.rows()));
    product[level] = lean.hessian.mm(part[level]);
  }
  std::vector<double> p(levels * levels), r(levels), value(levels), rounded(levels);
  for (int i = 0; i < levels; ++i) {
    r[i] = dot_all(part[i], lean.hessian_target);
    for (int j = i; j < levels; ++j) p[i * levels + j] = p[j * levels + i] = dot_all(product[i], part[j]);
    value[i] = rounded[i] = lean.level_values[i];
  }
  const double before = quadratic(p.data(), r.data(), value);
  for (int sweep = 0; sweep < 50; ++sweep)
    for (int i = 0; i < levels; ++i) {
      if (p[i * levels + i] <= 0) continue;
      double rest = r[i];
      for (int j = 0; j < levels; ++j)
        if (j != i) rest -= p[i * levels + j] * value[j];
      value[i] = std::max(rest / p[i * levels + i], 1e-3);
    }
  for (int i = 0; i < levels; ++i) rounded[i] = half_to_float(float_to_half(static_cast<float>(value[i])));
  if (quadratic(p.data(), r.data(), rounded) < before)
    for (int i = 0; i < levels; ++i) lean.level_values[i] = static_cast<float>(rounded[i]);
}

}  // namespace

void refit(LeanWeight& lean) {
  if (!lean.hessian_target.defined()) {
    const StageTimer timer("products", 2.0 * static_cast<double>(lean.cols() * lean.cols()) * static_cast<double>(lean.rows()));
    lean.hessian_target = lean.hessian.mm(lean.target);
  }
  refit_scales(lean);
  refit_levels(lean);
}

}  // namespace stbllm
