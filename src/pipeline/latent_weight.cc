#include "stbllm/pipeline/latent_weight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/pipeline/adam.h"
#include "stbllm/quantize/lanes.h"

namespace stbllm {
namespace {

constexpr int kMaxLevels = 3;
/// Pruned weights start at no more than this share of the smallest level: near, but not kept.
constexpr float kPrunedLimit = 0.5f;
/// And all keep this distance from where their symbol would be another, in the same unit.
constexpr float kMargin = 0.02f;

/// Levels as the inner loops want them: the value of a kept weight is base + sum of the steps whose border it exceeds.
struct LevelSteps {
  float base = 0;
  std::array<float, kMaxLevels - 1> border{}, step{};
  int count = 1;
  /// `placed`: the levels that decide which one a latent belongs to.
  LevelSteps(const std::vector<float>& levels, const std::vector<float>& placed) : base(levels[0]), count(static_cast<int>(levels.size())) {
    for (int l = 0; l + 1 < count; ++l) {
      border[l] = (placed[l] + placed[l + 1]) / 2;
      step[l] = levels[l + 1] - levels[l];
    }
  }
};

/// Symbols (0, +-(1 + level)) and their values for the M latents of one group. Rank of a weight: how many magnitudes of the
/// group come before it, the earlier column first among equals.
template <int M>
STBLLM_INLINE void project_group(const float* latent, int keep, const LevelSteps& levels, float* value, int* symbol) {
  float magnitude[M];
  int rank[M];
  for (int j = 0; j < M; ++j) {
    magnitude[j] = std::fabs(latent[j]);
    rank[j] = 0;
  }
  for (int c = 0; c < M; ++c)
    for (int j = 0; j < M; ++j) rank[j] += c < j ? magnitude[c] >= magnitude[j] : magnitude[c] > magnitude[j];
  for (int j = 0; j < M; ++j) {
    float v = levels.base;
    int s = 1;
    for (int l = 0; l < kMaxLevels - 1; ++l) {
      const bool above = l + 1 < levels.count && magnitude[j] > levels.border[l];
      v += above ? levels.step[l] : 0.f;
      s += above;
    }
    const bool kept = rank[j] < keep;
    value[j] = kept ? std::copysign(v, latent[j]) : 0.f;
    symbol[j] = kept ? (std::signbit(latent[j]) ? -s : s) : 0;
  }
}

/// A row of a matrix in training. The last group may be narrower than M: what lies behind it counts as smaller than anything.
struct Row {
  float* latent;
  float *mean, *square;      // null when codes stay
  uint16_t* dense;
  const uint16_t* gradient;  // null when only projecting
  const float* unit_scales;
  int8_t* symbols;           // null unless wanted
  int64_t cols;
  int column_block, keep;
  float gain;
};

template <int M, typename Visit>
STBLLM_INLINE void for_each_group(const Row& row, const LevelSteps& levels, const Visit& visit) {
  float value[M];
  int symbol[M];
  for (int64_t first = 0; first < row.cols; first += M) {
    const int width = static_cast<int>(std::min<int64_t>(M, row.cols - first));
    if (width == M) {
      project_group<M>(row.latent + first, row.keep, levels, value, symbol);
    } else {
      float padded[M] = {};
      std::copy_n(row.latent + first, width, padded);
      project_group<M>(padded, std::min(row.keep, width), levels, value, symbol);
    }
    visit(first, width, value, symbol);
  }
}

template <int M>
STBLLM_INLINE void project_row_of(const Row& row, const LevelSteps& levels) {
  for_each_group<M>(row, levels, [&](int64_t first, int width, const float* value, const int* symbol) {
    const float scale = row.unit_scales[first / row.column_block] * row.gain;
    for (int j = 0; j < width; ++j) row.dense[first + j] = float_to_bfloat16(value[j] * scale);
    if (row.symbols != nullptr)
      for (int j = 0; j < width; ++j) row.symbols[first + j] = static_cast<int8_t>(symbol[j]);
  });
}

/// Moves the latents; adds the row's share of the gradients of its gain (the return value) and of the levels' gains.
template <int M>
STBLLM_INLINE float step_row_of(const Row& row, const LevelSteps& levels, const AdamStep& adam, float* level_gradient) {
  float gain_gradient = 0;
  for_each_group<M>(row, levels, [&](int64_t first, int width, const float* value, const int* symbol) {
    const float scale = row.unit_scales[first / row.column_block] * row.gain;
    float product[M] = {};
    for (int j = 0; j < width; ++j) product[j] = bfloat16_to_float(row.gradient[first + j]) * value[j] * scale;
    float sum = 0;
    for (int j = 0; j < M; ++j) sum += product[j];
    gain_gradient += sum;
    for (int l = 0; l < levels.count; ++l)
      for (int j = 0; j < width; ++j) level_gradient[l] += std::abs(symbol[j]) == l + 1 ? product[j] : 0.f;
    if (row.mean != nullptr)
      for (int j = 0; j < width; ++j)
        row.latent[first + j] += adam(bfloat16_to_float(row.gradient[first + j]) * scale, row.mean[first + j], row.square[first + j]);
  });
  return gain_gradient;
}

STBLLM_CLONES void project_row_4(const Row& row, const LevelSteps& levels) { project_row_of<4>(row, levels); }
STBLLM_CLONES void project_row_8(const Row& row, const LevelSteps& levels) { project_row_of<8>(row, levels); }
STBLLM_CLONES void project_row_16(const Row& row, const LevelSteps& levels) { project_row_of<16>(row, levels); }
STBLLM_CLONES float step_row_4(const Row& row, const LevelSteps& levels, const AdamStep& adam, float* level_gradient) {
  return step_row_of<4>(row, levels, adam, level_gradient);
}
STBLLM_CLONES float step_row_8(const Row& row, const LevelSteps& levels, const AdamStep& adam, float* level_gradient) {
  return step_row_of<8>(row, levels, adam, level_gradient);
}
STBLLM_CLONES float step_row_16(const Row& row, const LevelSteps& levels, const AdamStep& adam, float* level_gradient) {
  return step_row_of<16>(row, levels, adam, level_gradient);
}

void project_row(int group, const Row& row, const LevelSteps& levels) {
  (group == 4 ? project_row_4 : group == 8 ? project_row_8 : project_row_16)(row, levels);
}

at::Tensor half_precision(const at::Tensor& x) { return x.clamp(1e-6, 6e4).to(at::kHalf).to(at::kFloat); }

}  // namespace

TuneRates decayed(const TuneRates& peak, int64_t done, int64_t total) {
  constexpr double kWarmup = 8;
  const double factor = 0.5 * (1 + std::cos(M_PI * static_cast<double>(done) / static_cast<double>(total))) *
                        std::min(1.0, static_cast<double>(done + 1) / kWarmup);
  return {peak.gains * factor, peak.codes * factor};
}

LatentWeight::LatentWeight(BinarizedWeight& weight, const at::Tensor& original, bool train_codes)
    : weight_(weight), train_codes_(train_codes), first_symbols_(weight.symbols), first_scales_(weight.scale_bits < 16 ? weight.row_scales : weight.scales) {
  STBLLM_CHECK(weight.nm.group == 4 || weight.nm.group == 8 || weight.nm.group == 16, "groups of {}", weight.nm.group);
  STBLLM_CHECK(!weight.has_salient() && !weight.unpackable.defined(), "only lean weights are trained");
  const int64_t rows = weight.rows(), cols = weight.cols();
  if (weight.scale_bits < 16) {
    const at::Tensor values = weight.level_values.contiguous();
    levels_.assign(values.data_ptr<float>(), values.data_ptr<float>() + values.numel());
  } else {
    levels_ = {1.f};
  }
  unit_scales_ = (weight.scales.select(2, 0) / levels_[0]).contiguous();
  const at::Tensor block = at::arange(cols, at::kLong).div(weight.column_block, "floor");
  const at::Tensor scale = unit_scales_.index_select(1, block);
  // A latent starts at the original weight, moved to where its symbol holds: what was a close call flips early.
  const at::Tensor sign = weight.symbols.sign().to(at::kFloat), relative = original.to(at::kFloat) / scale;
  const float limit = kPrunedLimit * levels_[0];
  latent_ = relative.clamp(-limit, limit);
  for (size_t l = 0; l < levels_.size(); ++l) {
    const float low = (l == 0 ? limit : (levels_[l - 1] + levels_[l]) / 2) + kMargin * levels_[0];
    const float high = l + 1 == levels_.size() ? std::numeric_limits<float>::max() : (levels_[l] + levels_[l + 1]) / 2 - kMargin * levels_[0];
    latent_ = at::where(weight.symbols.abs().eq(static_cast<int64_t>(l) + 1), sign * (relative * sign).clamp(low, high), latent_);
  }
  if (weight.has_outliers()) {
    const at::Tensor columns = weight.outlier_columns.contiguous();
    outlier_columns_.assign(columns.data_ptr<int32_t>(), columns.data_ptr<int32_t>() + columns.numel());
    outlier_values_ = weight.outlier_values.t().contiguous();
    // What a code says of an exact column does not count; it keeps saying it.
    for (const int32_t c : outlier_columns_) latent_.select(1, c).copy_(weight.symbols.select(1, c).sign() * levels_[0]);
  }
  latent_ = latent_.contiguous();
  row_gain_ = at::zeros({rows}, at::kFloat);
  level_gain_ = at::zeros({static_cast<int64_t>(levels_.size())}, at::kFloat);
  const auto moments = [](const at::Tensor& x) { return Moments{at::zeros_like(x), at::zeros_like(x)}; };
  if (train_codes_) latent_moments_ = moments(latent_);
  row_moments_ = moments(row_gain_);
  level_moments_ = moments(level_gain_);
  dense_ = at::empty({rows, cols}, at::kBFloat16);
  project();
  dense_.set_requires_grad(true);
}

std::vector<float> LatentWeight::levels_now() const {
  std::vector<float> now = levels_;
  for (size_t l = 0; l < now.size(); ++l) now[l] *= std::exp(level_gain_.data_ptr<float>()[l]);
  return now;
}

void LatentWeight::project(int8_t* symbols) {
  const std::vector<float> now = levels_now();
  const LevelSteps levels(now, train_codes_ ? now : levels_);
  const int64_t cols = latent_.size(1), blocks = unit_scales_.size(1), outliers = static_cast<int64_t>(outlier_columns_.size());
  auto* dense = static_cast<uint16_t*>(dense_.data_ptr());
  at::parallel_for(0, latent_.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float gain = std::exp(row_gain_.const_data_ptr<float>()[r]);
      project_row(weight_.nm.group,
                  {latent_.data_ptr<float>() + r * cols, nullptr, nullptr, dense + r * cols, nullptr, unit_scales_.data_ptr<float>() + r * blocks,
                   symbols == nullptr ? nullptr : symbols + r * cols, cols, weight_.column_block, weight_.nm.keep, gain},
                  levels);
      for (int64_t k = 0; k < outliers; ++k)
        dense[r * cols + outlier_columns_[k]] = float_to_bfloat16(outlier_values_.data_ptr<float>()[r * outliers + k]);
    }
  });
}

void LatentWeight::step(const TuneRates& rates) {
  const at::Tensor gradient = dense_.grad().contiguous();
  STBLLM_CHECK(gradient.scalar_type() == at::kBFloat16, "the gradient of bfloat16 weights");
  const int64_t rows = latent_.size(0), cols = latent_.size(1), blocks = unit_scales_.size(1), level_count = level_gain_.numel();
  for (const int32_t c : outlier_columns_) gradient.select(1, c).zero_();
  ++steps_;
  const AdamStep code_adam(rates.codes, steps_), gain_adam(rates.gains, steps_);
  const std::vector<float> now = levels_now();
  const LevelSteps levels(now, train_codes_ ? now : levels_);
  const bool codes = train_codes_ && rates.codes > 0;
  const at::Tensor level_gradients = at::zeros({rows, level_count}, at::kFloat);
  const auto step_row = weight_.nm.group == 4 ? step_row_4 : weight_.nm.group == 8 ? step_row_8 : step_row_16;
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float& log_gain = row_gain_.data_ptr<float>()[r];
      const float gain_gradient =
          step_row({latent_.data_ptr<float>() + r * cols, codes ? latent_moments_.mean.data_ptr<float>() + r * cols : nullptr,
                    codes ? latent_moments_.square.data_ptr<float>() + r * cols : nullptr, nullptr,
                    static_cast<const uint16_t*>(gradient.data_ptr()) + r * cols, unit_scales_.data_ptr<float>() + r * blocks, nullptr, cols,
                    weight_.column_block, weight_.nm.keep, std::exp(log_gain)},
                   levels, code_adam, level_gradients.data_ptr<float>() + r * level_count);
      log_gain += gain_adam(gain_gradient, row_moments_.mean.data_ptr<float>()[r], row_moments_.square.data_ptr<float>()[r]);
    }
  });
  if (level_count > 1) {
    const at::Tensor sums = level_gradients.sum(0, false, at::kDouble);
    for (int64_t l = 0; l < level_count; ++l)
      level_gain_.data_ptr<float>()[l] += gain_adam(static_cast<float>(sums.data_ptr<double>()[l]), level_moments_.mean.data_ptr<float>()[l],
                                                    level_moments_.square.data_ptr<float>()[l]);
  }
  dense_.mutable_grad().reset();
  project();
}

int64_t LatentWeight::write_back() {
  const std::vector<float> now = levels_now();
  if (train_codes_) {
    at::Tensor symbols = at::empty(latent_.sizes(), at::kChar);
    project(symbols.data_ptr<int8_t>());
    for (const int32_t c : outlier_columns_) symbols.select(1, c).sign_();
    weight_.symbols = symbols;
  }
  const at::Tensor gain = row_gain_.exp();
  if (weight_.scale_bits < 16) {
    weight_.row_scales = half_precision(first_scales_ * gain);
    weight_.level_values = half_precision(at::tensor(now, at::kFloat));
    weight_.expand_scales();
  } else {
    weight_.scales = half_precision(first_scales_ * gain.view({-1, 1, 1}));
  }
  return weight_.symbols.ne(first_symbols_).sum().item<int64_t>();
}

}  // namespace stbllm
