// The error of a row is a quadratic in its scales (given the levels) and, summed over rows, in the levels
// (given the scales). Both come from the same numbers. With u_bl the signs of the weights of column block b
// that have level l, zero elsewhere,
//   P_bl,cm = u_bl^T H u_cm,   r_bl = u_bl^T H w:
// the scales a minimise a^T A a - 2 a^T s with A_bc = sum_lm v_l v_m P_bl,cm and s_b = sum_l v_l r_bl, a
// small solve per row; the levels v the same with the roles changed. P is symmetric and H w does not change
// while a linear is optimised, so that of each product with H only the part from its own column block on is
// needed. Rounding to representable values is coordinate descent on the same quadratic, and a row whose error
// would rise stays.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "column_groups.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/lanes.h"
#include "stbllm/base/profile.h"
#include "stbllm/quantize/tensor_search.h"

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

/// sums[lane] = sum over `count` columns of a * b, for kTileRows rows side by side; neighbouring columns are
/// `stride` apart.
STBLLM_CLONES void dot_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                            double* sums) {
  std::fill_n(sums, kTileRows, 0.0);
  for (int64_t first = 0; first < count; first += kFloatTerms) {
    const int64_t end = std::min(first + kFloatTerms, count);
    float part[kTileRows] = {};
    for (int64_t k = first; k < end; ++k)
      for (int lane = 0; lane < kTileRows; ++lane)
        part[lane] += a[k * a_stride + lane] * b[k * b_stride + lane];
    for (int lane = 0; lane < kTileRows; ++lane) sums[lane] += part[lane];
  }
}

/// Rows whose parts exist at a time.
constexpr int64_t kRowsPerPass = 1024;

/// P and r of `rows` rows from `first_row` on, for all levels or, where these stay what they are, for all of
/// them as one.
struct RowParts {
  int64_t first_row, rows, blocks;
  std::vector<float> values;  // (levels): what they are worth; 1 for all as one
  std::vector<float> p;       // (rows, pairs of column blocks b <= c, levels of b, levels of c)
  std::vector<float> r;       // (rows, blocks, levels)

  int64_t levels() const { return std::ssize(values); }
  int64_t pairs() const { return blocks * (blocks + 1) / 2; }
  /// Where the (levels, levels) of two column blocks b <= c begin in p, and the (levels) of one in r.
  int64_t pair(int64_t row, int64_t b, int64_t c) const {
    return (row * pairs() + b * blocks - b * (b - 1) / 2 + c - b) * levels() * levels();
  }
  int64_t block(int64_t row, int64_t b) const { return (row * blocks + b) * levels(); }
};

/// The signs of the weights that have each level, or what they are worth: float32 (cols, levels or 1, lanes),
/// zeros in lanes behind the last row.
at::Tensor make_signs(const LeanWeight& lean, int64_t first_row, int64_t rows, int64_t lanes, bool by_level) {
  const int64_t levels = static_cast<int64_t>(lean.level_values.size()), sets = by_level ? levels : 1;
  at::Tensor signs = at::zeros({lean.cols(), sets, lanes}, at::kFloat);
  at::parallel_for(0, lean.cols(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int8_t* symbol = lean.symbols.const_data_ptr<int8_t>() + c * lean.rows() + first_row;
      for (int64_t level = 0; level < levels; ++level) {
        float* out = signs.data_ptr<float>() + (c * sets + (by_level ? level : 0)) * lanes;
        const float value = by_level ? 1.f : lean.level_values[level];
        const auto plus = static_cast<int8_t>(1 + level), minus = static_cast<int8_t>(-1 - level);
        for (int64_t row = 0; row < rows; ++row)
          out[row] += value * static_cast<float>((symbol[row] == plus) - (symbol[row] == minus));
      }
    }
  });
  return signs;
}

RowParts make_parts(const LeanWeight& lean, int64_t first_row, int64_t rows, bool by_level) {
  const int64_t blocks = lean.column_blocks(), cols = lean.cols(),
                lanes = ceil_div(rows, kTileRows) * kTileRows;
  RowParts parts{first_row, rows, blocks, by_level ? lean.level_values : std::vector<float>{1}, {}, {}};
  const int64_t levels = parts.levels();
  parts.p.resize(rows * parts.pairs() * levels * levels);
  parts.r.resize(rows * blocks * levels);
  const at::Tensor signs = make_signs(lean, first_row, rows, lanes, by_level);
  at::Tensor target = at::zeros({cols, lanes}, at::kFloat);
  target.narrow(1, 0, rows).copy_(lean.hessian_target.narrow(1, first_row, rows));
  for (int64_t b = 0; b < blocks; ++b) {
    const BlockColumns block(lean, b);
    const int64_t first = block.start, width = block.width;
    const at::Tensor product = [&] {  // (cols - first, levels * lanes)
      const StageTimer timer("products", 2.0 * static_cast<double>((cols - first) * width) *
                                             static_cast<double>(levels * lanes));
      return lean.hessian.narrow(0, first, cols - first)
          .narrow(1, first, width)
          .mm(signs.narrow(0, first, width).flatten(1));
    }();
    at::parallel_for(0, lanes / kTileRows, 1, [&](int64_t begin, int64_t end) {
      double sums[kTileRows];
      const int64_t stride = levels * lanes;
      for (int64_t lane = begin * kTileRows; lane < end * kTileRows; lane += kTileRows) {
        const int64_t count = std::min<int64_t>(kTileRows, rows - lane);
        for (int64_t l = 0; l < levels; ++l) {
          const float* own = signs.const_data_ptr<float>() + (first * levels + l) * lanes + lane;
          dot_tile(own, stride, target.const_data_ptr<float>() + first * lanes + lane, lanes, width, sums);
          for (int64_t i = 0; i < count; ++i)
            parts.r[parts.block(lane + i, b) + l] = static_cast<float>(sums[i]);
        }
        for (int64_t c = b; c < blocks; ++c) {
          const BlockColumns their(lean, c);
          for (int64_t l = 0; l < levels; ++l)
            for (int64_t m = 0; m < levels; ++m) {
              dot_tile(product.const_data_ptr<float>() + (their.start - first) * stride + l * lanes + lane,
                       stride, signs.const_data_ptr<float>() + (their.start * levels + m) * lanes + lane,
                       stride, their.width, sums);
              for (int64_t i = 0; i < count; ++i)
                parts.p[parts.pair(lane + i, b, c) + l * levels + m] = static_cast<float>(sums[i]);
            }
        }
      }
    });
  }
  return parts;
}

/// The same by libtorch's operations, where the matrices are.
RowParts make_parts_by_tensors(const LeanWeight& lean, int64_t first_row, int64_t rows, bool by_level) {
  const int64_t blocks = lean.column_blocks();
  RowParts parts{first_row, rows, blocks, by_level ? lean.level_values : std::vector<float>{1}, {}, {}};
  const int64_t levels = parts.levels();
  const at::Tensor symbols = lean.symbols.narrow(1, first_row, rows),
                   target = lean.hessian_target.narrow(1, first_row, rows).unsqueeze(1);
  std::vector<at::Tensor> signs_of;  // (cols, rows) each
  if (by_level)
    for (int64_t l = 0; l < levels; ++l)
      signs_of.push_back(symbols.eq(1 + l).to(at::kFloat) - symbols.eq(-1 - l).to(at::kFloat));
  else
    signs_of.push_back(unit_values(symbols.contiguous(), lean.level_values));
  const at::Tensor signs = at::stack(signs_of, 1);  // (cols, levels, rows)
  const at::Tensor p = at::empty({parts.pairs(), levels, levels, rows}, signs.options()),
                   r = at::empty({blocks, levels, rows}, signs.options());
  for (int64_t b = 0, pair = 0; b < blocks; ++b) {
    const BlockColumns own(lean, b);
    const at::Tensor own_signs = signs.narrow(0, own.start, own.width);
    r[b].copy_((own_signs * target.narrow(0, own.start, own.width)).sum(0));
    const StageTimer timer("products",
                           2.0 * static_cast<double>((own.width + own.rest) * own.width * levels * rows));
    const at::Tensor product = lean.hessian.narrow(0, own.start, own.width + own.rest)
                                   .narrow(1, own.start, own.width)
                                   .mm(own_signs.flatten(1))
                                   .view({own.width + own.rest, levels, 1, rows});
    for (int64_t c = b; c < blocks; ++c, ++pair) {
      const BlockColumns their(lean, c);
      p[pair].copy_((product.narrow(0, their.start - own.start, their.width) *
                     signs.narrow(0, their.start, their.width).unsqueeze(1))
                        .sum(0));
    }
  }
  const auto to_host = [&](const at::Tensor& tensor) {  // rows come first there
    const at::Tensor host = tensor.movedim(-1, 0).contiguous().cpu();
    return std::vector<float>(host.const_data_ptr<float>(), host.const_data_ptr<float>() + host.numel());
  };
  parts.p = to_host(p);
  parts.r = to_host(r);
  return parts;
}

/// Solves A x = b for a positive definite A (n, n), whose lower triangle becomes its Cholesky factor; what
/// has no pivot becomes 0.
void solve(double* lower, const double* b, int64_t n, double* x) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double& sum = lower[i * n + j];
      for (int64_t k = 0; k < j; ++k) sum -= lower[i * n + k] * lower[j * n + k];
      if (i == j)
        sum = sum > 0 ? std::sqrt(sum) : 0;
      else
        sum = lower[j * n + j] > 0 ? sum / lower[j * n + j] : 0;
    }
    double sum = b[i];
    for (int64_t k = 0; k < i; ++k) sum -= lower[i * n + k] * x[k];
    x[i] = lower[i * n + i] > 0 ? sum / lower[i * n + i] : 0;
  }
  for (int64_t i = n - 1; i >= 0; --i) {
    double sum = x[i];
    for (int64_t k = i + 1; k < n; ++k) sum -= lower[k * n + i] * x[k];
    x[i] = lower[i * n + i] > 0 ? sum / lower[i * n + i] : 0;
  }
}

/// Solves and rounds the scales of the rows of `parts`.
void refit_scales(LeanWeight& lean, const RowParts& parts) {
  const int64_t blocks = parts.blocks, levels = parts.levels(), rows = lean.rows();
  const bool coded = lean.scale_bits < 16;
  at::parallel_for(0, parts.rows, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> p(blocks * blocks), damped, r(blocks), exact(blocks), old(blocks), now(blocks);
    std::vector<uint8_t> codes(blocks);
    const double *pr = p.data(), *rr = r.data();
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t b = 0; b < blocks; ++b) {
        double sum = 0;
        for (int64_t l = 0; l < levels; ++l)
          sum += static_cast<double>(parts.values[l]) * parts.r[parts.block(i, b) + l];
        r[b] = sum;
        for (int64_t c = b; c < blocks; ++c) {
          const float* part = &parts.p[parts.pair(i, b, c)];
          sum = 0;
          for (int64_t l = 0; l < levels; ++l)
            for (int64_t m = 0; m < levels; ++m)
              sum += static_cast<double>(parts.values[l]) * parts.values[m] * part[l * levels + m];
          p[b * blocks + c] = p[c * blocks + b] = sum;
        }
      }
      double trace = 0;
      for (int64_t b = 0; b < blocks; ++b) trace += p[b * blocks + b];
      damped = p;
      for (int64_t b = 0; b < blocks; ++b)
        damped[b * blocks + b] += 1e-6 * trace / static_cast<double>(blocks) + 1e-30;
      solve(damped.data(), rr, blocks, exact.data());

      const int64_t row = parts.first_row + i;
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
        if (coded && base < kSmallestScale) continue;
        for (int64_t b = 0; b < blocks; ++b) {
          const float start = std::isfinite(exact[b]) && exact[b] > 0 ? static_cast<float>(exact[b])
                                                                      : static_cast<float>(old[b]);
          now[b] = representable_scale(lean.scale_bits, base, start, codes[b]);
        }
        for (int sweep = 0, moved = 1; moved != 0 && sweep < 3; ++sweep) {
          moved = 0;
          for (int64_t b = 0; b < blocks; ++b) {
            if (pr[b * blocks + b] <= 0) continue;
            double rest = rr[b];
            for (int64_t c = 0; c < blocks; ++c)
              if (c != b) rest -= pr[b * blocks + c] * now[c];
            const double last = now[b];
            now[b] = representable_scale(lean.scale_bits, base, static_cast<float>(rest / pr[b * blocks + b]),
                                         codes[b]);
            moved += now[b] != last;
          }
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

/// The quadratic in the levels, over all rows that were added.
struct LevelProblem {
  std::vector<double> p, r;  // (levels, levels), (levels)
  explicit LevelProblem(int64_t levels) : p(levels * levels), r(levels) {}

  /// Adds the rows of `parts` with the scales they have now.
  void add(const LeanWeight& lean, const RowParts& parts) {
    const int64_t blocks = parts.blocks, levels = parts.levels(), rows = lean.rows(),
                  per_row = levels * (levels + 1);
    std::vector<double> sums(parts.rows *
                             per_row);  // a row's own, so that the order of summation is that of the rows
    at::parallel_for(0, parts.rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float* scale =
            lean.scales.const_data_ptr<float>() + parts.first_row + i;  // of block b: scale[b * rows]
        double *own_p = &sums[i * per_row], *own_r = own_p + levels * levels;
        for (int64_t b = 0; b < blocks; ++b) {
          for (int64_t l = 0; l < levels; ++l)
            own_r[l] += static_cast<double>(scale[b * rows]) * parts.r[parts.block(i, b) + l];
          for (int64_t c = b; c < blocks; ++c) {
            const double both = static_cast<double>(scale[b * rows]) * scale[c * rows];
            const float* part = &parts.p[parts.pair(i, b, c)];
            for (int64_t l = 0; l < levels; ++l)
              for (int64_t m = 0; m < levels; ++m)
                own_p[l * levels + m] +=
                    both * (b == c ? part[l * levels + m] : part[l * levels + m] + part[m * levels + l]);
          }
        }
      }
    });
    for (int64_t i = 0; i < parts.rows; ++i) {
      for (size_t k = 0; k < p.size(); ++k) p[k] += sums[i * per_row + static_cast<int64_t>(k)];
      for (size_t k = 0; k < r.size(); ++k)
        r[k] += sums[i * per_row + levels * levels + static_cast<int64_t>(k)];
    }
  }
};

void refit_levels(LeanWeight& lean, const LevelProblem& problem) {
  const int levels = static_cast<int>(lean.level_values.size());
  const auto& [p, r] = problem;
  std::vector<double> value(lean.level_values.begin(), lean.level_values.end()), rounded(levels);
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

template <typename MakeParts>
void refit_with(const MakeParts& make, LeanWeight& lean, bool with_levels) {
  if (!lean.hessian_target.defined()) {
    const StageTimer timer(
        "products", 2.0 * static_cast<double>(lean.cols() * lean.cols()) * static_cast<double>(lean.rows()));
    lean.hessian_target = lean.hessian.mm(lean.target);
  }
  with_levels = with_levels && lean.level_values.size() > 1;
  LevelProblem levels(static_cast<int64_t>(lean.level_values.size()));
  for (int64_t first = 0; first < lean.rows(); first += kRowsPerPass) {
    const RowParts parts = make(lean, first, std::min(kRowsPerPass, lean.rows() - first), with_levels);
    refit_scales(lean, parts);
    if (with_levels) levels.add(lean, parts);
  }
  if (with_levels) refit_levels(lean, levels);
}

}  // namespace

void refit(LeanWeight& lean, bool with_levels) {
  if (!lean.target.is_cpu()) return by_tensors::refit(lean, with_levels);
  refit_with(make_parts, lean, with_levels);
}

void by_tensors::refit(LeanWeight& lean, bool with_levels) {
  refit_with(make_parts_by_tensors, lean, with_levels);
}

}  // namespace stbllm
