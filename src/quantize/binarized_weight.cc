#include "stbllm/quantize/binarized_weight.h"

#include <cmath>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"

namespace stbllm {

at::Tensor BinarizedWeight::to_dense() const {
  if (unpackable.defined()) return unpackable;
  const int64_t rows = symbols.size(0), cols = symbols.size(1);
  const at::Tensor kept = symbols.ne(0);
  const at::Tensor level = (symbols.abs() - 1).clamp_min(0).to(at::kLong);
  const at::Tensor block = at::arange(cols, at::kLong).div(column_block, "floor").unsqueeze(0).expand({rows, cols});
  const int64_t slots = scales.size(2);
  // scale(row, col / column_block, level) as a gather from (rows, blocks * slots)
  const at::Tensor flat = scales.reshape({rows, -1});
  at::Tensor dense = flat.gather(1, block * slots + level).mul_(symbols.sign().to(at::kFloat));
  if (has_salient()) {
    const at::Tensor columns = salient_columns.to(at::kLong);
    const at::Tensor salient_block = columns.div(column_block, "floor").unsqueeze(0).expand({rows, -1}) * slots;
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
  const int count = 1 << scale_bits;
  at::Tensor factor = at::empty({count}, at::kFloat);
  for (int code = 0; code < count; ++code)  // twin of scale_code_factor() in pack/
    factor.data_ptr<float>()[code] = static_cast<float>(std::exp2(-code * std::exp2(2.0 - scale_bits)));
  const at::Tensor per_block = row_scales.unsqueeze(1) * factor.index_select(0, scale_codes.flatten().to(at::kLong)).view_as(scale_codes);
  scales = per_block.unsqueeze(2) * level_values.view({1, 1, -1});
}

double relative_output_error(const at::Tensor& weight, const at::Tensor& quantized, const at::Tensor& hessian) {
  const at::Tensor w = weight.to(at::kFloat);
  const at::Tensor d = quantized - w;
  const double error = d.mm(hessian).mul_(d).sum(0, false, at::kDouble).sum().item<double>();
  const double energy = w.mm(hessian).mul_(w).sum(0, false, at::kDouble).sum().item<double>();
  return energy > 0 ? error / energy : 0;
}

}  // namespace stbllm
