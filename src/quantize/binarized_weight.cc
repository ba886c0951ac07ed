#include "stbllm/quantize/binarized_weight.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/lanes.h"

namespace stbllm {

at::Tensor BinarizedWeight::to_dense() const {
  if (unpackable.defined()) return unpackable;
  const int64_t rows = symbols.size(0), cols = symbols.size(1);
  const at::Tensor kept = symbols.ne(0);
  const at::Tensor level = (symbols.abs() - 1).clamp_min(0).to(at::kLong);
  const at::Tensor block =
      at::arange(cols, at::kLong).div(column_block, "floor").unsqueeze(0).expand({rows, cols});
  const int64_t slots = scales.size(2);
  // scale(row, col / column_block, level) as a gather from (rows, blocks * slots)
  const at::Tensor flat = scales.reshape({rows, -1});
  at::Tensor dense = flat.gather(1, block * slots + level).mul_(symbols.sign().to(at::kFloat));
  if (has_salient()) {
    const at::Tensor columns = salient_columns.to(at::kLong);
    const at::Tensor salient_block =
        columns.div(column_block, "floor").unsqueeze(0).expand({rows, -1}) * slots;
    const at::Tensor main = flat.gather(1, salient_block + levels);
    const at::Tensor residual = flat.gather(1, salient_block + levels + 1);
    const at::Tensor sign = symbols.index_select(1, columns).sign().to(at::kFloat);
    const at::Tensor values = main * sign + residual * salient_signs.t().to(at::kFloat);
    dense.index_copy_(1, columns, values);
  }
  dense.mul_(kept);
  if (has_outliers()) dense.index_copy_(1, outlier_columns.to(at::kLong), outlier_values.t().contiguous());
  return dense;
}

double BinarizedWeight::salient_share() const {
  return has_salient() ? static_cast<double>(salient_columns.numel()) / static_cast<double>(cols()) : 0;
}

void BinarizedWeight::expand_scales() {
  const at::Tensor factor = at::tensor(at::ArrayRef<float>(scale_code_factors(scale_bits)));
  const at::Tensor per_block =
      row_scales.unsqueeze(1) *
      factor.index_select(0, scale_codes.flatten().to(at::kLong)).view_as(scale_codes);
  scales = per_block.unsqueeze(2) * level_values.view({1, 1, -1});
}

namespace {

/// Columns of H that are multiplied at a time: wide enough for full-speed products.
constexpr int64_t kPanel = 256;

float dot(const float* a, const float* b, int64_t count) {
  return with_lanes([&]<typename Lanes>() STBLLM_INLINED {
    Lanes sums = {};
    for_each_lanes(0, count, [&](int64_t at, int lanes) STBLLM_INLINED {
      sums += load_lanes<Lanes>(a + at, lanes) * load_lanes<Lanes>(b + at, lanes);
    });
    return sum_of(sums);
  });
}

/// tr(D H D^T) for a symmetric H: panels on and above its diagonal, those above count twice.
double output_energy(const at::Tensor& d, const at::Tensor& hessian) {
  if (!d.is_cpu()) return (d.mm(hessian) * d).sum(at::kDouble).item<double>();
  const int64_t rows = d.size(0), cols = d.size(1);
  STBLLM_CHECK(d.is_contiguous(), "rows are adjacent");
  std::vector<double> energy(
      static_cast<size_t>(rows));  // a row's own: no sum depends on the number of threads
  for (int64_t first = 0; first < cols; first += kPanel) {
    const int64_t width = std::min(kPanel, cols - first), rest = cols - first;
    const at::Tensor product =
        d.narrow(1, first, width).mm(hessian.narrow(0, first, width).narrow(1, first, rest));
    at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float *own = d.const_data_ptr<float>() + row * cols + first,
                    *mixed = product.const_data_ptr<float>() + row * rest;
        energy[row] +=
            double{dot(own, mixed, width)} + 2 * double{dot(own + width, mixed + width, rest - width)};
      }
    });
  }
  return std::accumulate(energy.begin(), energy.end(), 0.0);
}

}  // namespace

OutputError::OutputError(const at::Tensor& weight, const at::Tensor& hessian)
    : weight_(weight.to(hessian.device(), at::kFloat).contiguous()),
      hessian_(hessian),
      energy_(output_energy(weight_, hessian)) {}

double OutputError::operator()(const at::Tensor& quantized) const {
  const double error = output_energy((quantized.to(hessian_.device()) - weight_).contiguous(), hessian_);
  return energy_ > 0 ? error / energy_ : 0;
}

double OutputError::flops(int64_t rows, int64_t cols) {
  double flops = 0;
  for (int64_t first = 0; first < cols; first += kPanel)
    flops += 2.0 * static_cast<double>(rows * std::min(kPanel, cols - first) * (cols - first));
  return flops;
}

}  // namespace stbllm
