#include "stbllm/quantize/lean_weight.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "column_groups.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/quantize/binarized_weight.h"
#include "stbllm/quantize/nm_select.h"

namespace stbllm {
namespace {

float round_to_half(float x) { return half_to_float(float_to_half(x)); }

}  // namespace

at::Tensor unit_values(const at::Tensor& symbols, std::span<const float> level_values) {
  const int levels = static_cast<int>(level_values.size());
  std::array<float, 7> table{};  // by symbol + levels
  for (int level = 0; level < levels; ++level) {
    table[levels + 1 + level] = level_values[level];
    table[levels - 1 - level] = -level_values[level];
  }
  if (!symbols.is_cpu()) {
    const at::Tensor on_device =
        at::tensor(at::ArrayRef<float>(table.data(), 2 * levels + 1), at::kFloat).to(symbols.device());
    return on_device.index_select(0, symbols.to(at::kInt).add_(levels).flatten()).view(symbols.sizes());
  }
  at::Tensor values = at::empty(symbols.sizes(), at::kFloat);
  at::parallel_for(0, symbols.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
    const int8_t* symbol = symbols.const_data_ptr<int8_t>();
    float* out = values.data_ptr<float>();
    for (int64_t i = begin; i < end; ++i) out[i] = table[symbol[i] + levels];
  });
  return values;
}

at::Tensor LeanWeight::dense() const {
  at::Tensor values = unit_values(symbols, level_values);
  for (int64_t b = 0; b < column_blocks(); ++b) {
    const BlockColumns block(*this, b);
    values.narrow(0, block.start, block.width).mul_(scales[b].to(values.device()).unsqueeze(0));
  }
  return values;
}

double LeanWeight::error() const {
  const at::Tensor d = dense().sub_(target);
  return hessian.mm(d).mul_(d).sum(0, false, at::kDouble).sum().item<double>();
}

float LeanWeight::set_scale(int64_t block, int64_t row, float wanted) {
  const bool coded = scale_bits < 16;
  const int64_t at = block * rows() + row;
  uint8_t unused = 0;
  uint8_t& code = coded ? scale_codes.data_ptr<uint8_t>()[at] : unused;
  return scales.data_ptr<float>()[at] =
             representable_scale(scale_bits, coded ? row_scales.data_ptr<float>()[row] : 0.f, wanted, code);
}

float representable_scale(int scale_bits, float row_scale, float wanted, uint8_t& code) {
  if (scale_bits == 16) return std::max(round_to_half(wanted), kSmallestScale);
  // Codes are logarithmic; the nearest in value is one of the two around the exact logarithm.
  const int last = (1 << scale_bits) - 1;
  const double step = std::exp2(2.0 - scale_bits);
  const std::array<float, 64>& factors = scale_code_factors(scale_bits);
  const auto value = [&](int c) { return row_scale * factors[c]; };
  const double exact = wanted > 0 ? -std::log2(static_cast<double>(wanted) / row_scale) / step : last;
  const int below =
      std::clamp(static_cast<int>(std::floor(std::clamp(exact, 0.0, static_cast<double>(last)))), 0, last);
  const int above = std::min(below + 1, last);
  code = static_cast<uint8_t>(std::abs(value(below) - wanted) <= std::abs(value(above) - wanted) ? below
                                                                                                 : above);
  return value(code);
}

void initialize_scales(LeanWeight& lean, int levels, const at::Tensor& column_weight) {
  const int64_t blocks = lean.column_blocks(), rows = lean.rows(), cols = lean.cols();
  const at::Tensor magnitude = lean.target.abs();
  const at::Tensor kept = nm_mask(magnitude, lean.nm).to(at::kFloat);
  const at::Tensor weighted = kept * column_weight.unsqueeze(1);
  lean.scales = at::empty({blocks, rows}, at::kFloat);
  at::Tensor relative = at::empty_like(magnitude);
  for (int64_t b = 0; b < blocks; ++b) {
    const BlockColumns block(lean, b);
    const at::Tensor m = magnitude.narrow(0, block.start, block.width),
                     w = kept.narrow(0, block.start, block.width);
    const at::Tensor mean = (m * w).sum(0) / w.sum(0).clamp_min(1);
    lean.scales[b].copy_(mean.clamp_min(kSmallestScale));
    relative.narrow(0, block.start, block.width).copy_(m / lean.scales[b].unsqueeze(0));
  }
  lean.level_values.assign(1, 1.f);
  if (levels > 1) {
    // Lloyd's iteration on a histogram of |w| / scale: cells of 1/64 up to 8 hold what a level could tell
    // apart.
    constexpr int kCells = 512;
    const at::Tensor cell = (relative * 64).clamp_max(kCells - 1).to(at::kLong).flatten();
    const at::Tensor histogram =
        at::zeros({kCells}, at::kDouble).index_add_(0, cell, weighted.flatten().to(at::kDouble));
    const double* mass = histogram.data_ptr<double>();
    std::vector<double> centre(levels);
    for (int l = 0; l < levels; ++l) centre[l] = 0.5 * std::exp2(l * (levels == 2 ? 1.3 : 1.0));
    for (int iteration = 0; iteration < 50; ++iteration) {
      std::vector<double> sum(levels, 0.0), weight(levels, 1e-12);
      for (int i = 0; i < kCells; ++i) {
        const double x = (i + 0.5) / 64;
        int nearest = 0;
        for (int l = 1; l < levels; ++l)
          if (std::abs(centre[l] - x) < std::abs(centre[nearest] - x)) nearest = l;
        sum[nearest] += mass[i] * x;
        weight[nearest] += mass[i];
      }
      for (int l = 0; l < levels; ++l)
        if (weight[l] > 1e-9) centre[l] = sum[l] / weight[l];
    }
    lean.level_values.resize(levels);
    for (int l = 0; l < levels; ++l) lean.level_values[l] = round_to_half(static_cast<float>(centre[l]));
  }
  const float* scales = lean.scales.const_data_ptr<float>();
  if (lean.scale_bits < 16) {
    // One step of headroom above the largest block, since feedback tends to make later blocks larger.
    lean.row_scales = at::empty({rows}, at::kFloat);
    lean.scale_codes = at::zeros({blocks, rows}, at::kByte);
    const at::Tensor largest = lean.scales.amax(0) * 1.2f;
    for (int64_t row = 0; row < rows; ++row)
      lean.row_scales.data_ptr<float>()[row] =
          std::max(round_to_half(largest.data_ptr<float>()[row]), kSmallestScale);
  }
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t row = 0; row < rows; ++row) lean.set_scale(b, row, scales[b * rows + row]);
  lean.symbols = at::zeros({cols, rows}, at::kChar);
}

}  // namespace stbllm
