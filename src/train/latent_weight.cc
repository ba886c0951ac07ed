#include "stbllm/train/latent_weight.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "stbllm/base/error.h"
#include "stbllm/model/linear.h"

namespace stbllm {
namespace {

/// Pruned weights start at no more than this share of the smallest level: near, but not kept.
constexpr float kPrunedLimit = 0.5f;
/// And all keep this distance from where their symbol would be another, in the same unit.
constexpr float kMargin = 0.02f;
/// The largest latent, in units of the largest level: what lies further out is kept at that level anyway.
constexpr float kLatentRange = 4;

at::Tensor half_precision(const at::Tensor& x) { return x.clamp(1e-6, 6e4).to(at::kHalf).to(at::kFloat); }

/// Where the latents start, (rows, cols) on the CPU: at the original weights, moved to where their symbols
/// hold. What was a close call flips early.
at::Tensor first_latents(const BinarizedWeight& weight, const at::Tensor& original,
                         const std::vector<float>& levels, const at::Tensor& unit_scales) {
  const at::Tensor block = at::arange(weight.cols(), at::kLong).div(weight.column_block, "floor");
  const at::Tensor sign = weight.symbols.sign().to(at::kFloat),
                   relative = original.to(at::kCPU, at::kFloat) / unit_scales.index_select(1, block);
  const float limit = kPrunedLimit * levels[0];
  at::Tensor latent = relative.clamp(-limit, limit);
  for (size_t l = 0; l < levels.size(); ++l) {
    const float low = (l == 0 ? limit : (levels[l - 1] + levels[l]) / 2) + kMargin * levels[0];
    const float high = l + 1 == levels.size() ? std::numeric_limits<float>::max()
                                              : (levels[l] + levels[l + 1]) / 2 - kMargin * levels[0];
    latent = at::where(weight.symbols.abs().eq(static_cast<int64_t>(l) + 1),
                       sign * (relative * sign).clamp(low, high), latent);
  }
  if (weight.has_outliers()) {
    // What a code says of an outlier column does not count; it keeps saying it.
    const at::Tensor columns = weight.outlier_columns.to(at::kLong);
    latent.index_copy_(1, columns, weight.symbols.index_select(1, columns).sign() * levels[0]);
  }
  return latent.contiguous();
}

}  // namespace

TuneRates decayed(const TuneRates& peak, int64_t done, int64_t total) {
  constexpr double kWarmup = 8;
  const double factor = 0.5 * (1 + std::cos(M_PI * static_cast<double>(done) / static_cast<double>(total))) *
                        std::min(1.0, static_cast<double>(done + 1) / kWarmup);
  return {peak.gains * factor, peak.codes * factor};
}

LatentState::LatentState(const BinarizedWeight& weight, const at::Tensor& original, bool train_codes)
    : nm(weight.nm), column_block(weight.column_block), train_codes(train_codes) {
  STBLLM_CHECK(nm.group == 4 || nm.group == 8 || nm.group == 16, "groups of {}", nm.group);
  STBLLM_CHECK(!weight.has_salient() && !weight.unpackable.defined(), "only lean weights are trained");
  const at::Device device = original.device();
  const at::TensorOptions floats = at::TensorOptions().dtype(at::kFloat).device(device);
  const at::Tensor values =
      weight.scale_bits < 16 ? weight.level_values.contiguous() : at::ones({1}, at::kFloat);
  const std::vector<float> value(values.const_data_ptr<float>(),
                                 values.const_data_ptr<float>() + values.numel());
  const at::Tensor units = (weight.scales.select(2, 0) / value[0]).contiguous();
  levels = values.to(device, at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  unit_scales = units.to(device);
  latent_step = value.back() * kLatentRange / std::numeric_limits<int16_t>::max();
  latent = first_latents(weight, original, value, units)
               .div_(latent_step)
               .round_()
               .clamp_(-std::numeric_limits<int16_t>::max(), std::numeric_limits<int16_t>::max())
               .to(device, at::kShort);
  outlier_columns = at::empty({0}, at::kLong);
  if (weight.has_outliers()) {
    outlier_columns = weight.outlier_columns.to(at::kLong).contiguous();
    outlier_values = weight.outlier_values.t().contiguous().to(device);
  }
  outlier_columns = outlier_columns.to(device);
  row_gain = at::zeros({weight.rows()}, floats);
  level_gain = at::zeros_like(levels);
  const auto moments = [](const at::Tensor& x) { return Moments{at::zeros_like(x), at::zeros_like(x)}; };
  if (train_codes) {
    latent_mean = at::zeros(latent.sizes(), floats.dtype(at::kBFloat16));
    row_square = at::zeros({weight.rows()}, floats);
    column_square = at::zeros({weight.cols()}, floats);
  }
  row_moments = moments(row_gain);
  level_moments = moments(level_gain);
  dense = at::empty(latent.sizes(), floats.dtype(fast_product_dtype(device)));
}

at::Tensor LatentState::latents() const { return latent.to(at::kFloat).mul_(latent_step); }

std::vector<float> LatentState::levels_now() const {
  const at::Tensor start = levels.cpu(), gain = level_gain.cpu();
  std::vector<float> now(start.const_data_ptr<float>(), start.const_data_ptr<float>() + start.numel());
  for (size_t l = 0; l < now.size(); ++l) now[l] *= std::exp(gain.const_data_ptr<float>()[l]);
  return now;
}

LatentWeight::LatentWeight(BinarizedWeight& weight, const at::Tensor& original, bool train_codes)
    : weight_(weight),
      state_(weight, original, train_codes),
      first_symbols_(weight.symbols),
      first_scales_(weight.scale_bits < 16 ? weight.row_scales : weight.scales) {
  project();
  state_.dense.set_requires_grad(true);
}

void LatentWeight::project(const at::Tensor& symbols) const {
  (state_.latent.is_cpu() ? by_lanes::project : by_tensors::project)(state_, symbols);
}

void LatentWeight::step(const TuneRates& rates) {
  const at::Tensor gradient = state_.dense.grad().contiguous();
  if (state_.outlier_columns.numel() > 0) gradient.index_fill_(1, state_.outlier_columns, 0);
  ++steps_;
  (state_.latent.is_cpu() ? by_lanes::step : by_tensors::step)(state_, gradient, rates, steps_);
  state_.dense.mutable_grad().reset();
  project();
}

void LatentWeight::visit_state(const std::string& name, const StateVisitor& visit) {
  const auto visit_parameter = [&](const char* part, at::Tensor& value, Moments& moments) {
    visit(name + part, value);
    visit(name + part + ".mean", moments.mean);
    visit(name + part + ".square", moments.square);
  };
  if (state_.train_codes) {
    visit(name + ".latent", state_.latent);
    visit(name + ".latent.mean", state_.latent_mean);
    visit(name + ".latent.row_square", state_.row_square);
    visit(name + ".latent.column_square", state_.column_square);
  }
  visit_parameter(".row_gain", state_.row_gain, state_.row_moments);
  visit_parameter(".level_gain", state_.level_gain, state_.level_moments);
}

void LatentWeight::resume(int64_t steps) {
  steps_ = steps;
  project();
}

int64_t LatentWeight::write_back() {
  if (state_.train_codes) {
    const at::Tensor symbols = at::empty_like(state_.latent, at::kChar);
    project(symbols);
    weight_.symbols = symbols.cpu();
    if (weight_.has_outliers()) {
      const at::Tensor columns = weight_.outlier_columns.to(at::kLong);
      weight_.symbols.index_copy_(1, columns, weight_.symbols.index_select(1, columns).sign());
    }
  }
  const at::Tensor gain = state_.row_gain.cpu().exp();
  if (weight_.scale_bits < 16) {
    weight_.row_scales = half_precision(first_scales_ * gain);
    weight_.level_values = half_precision(at::tensor(state_.levels_now(), at::kFloat));
    weight_.expand_scales();
  } else {
    weight_.scales = half_precision(first_scales_ * gain.view({-1, 1, 1}));
  }
  return weight_.symbols.ne(first_symbols_).sum().item<int64_t>();
}

}  // namespace stbllm
