#include "stbllm/train/latent_weight.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "stbllm/base/error.h"
#include "stbllm/base/lanes.h"
#include "stbllm/model/linear.h"
#include "stbllm/train/adam.h"

namespace stbllm {
namespace {

constexpr int kMaxLevels = 3;
/// Pruned weights start at no more than this share of the smallest level: near, but not kept.
constexpr float kPrunedLimit = 0.5f;
/// And all keep this distance from where their symbol would be another, in the same unit.
constexpr float kMargin = 0.02f;

/// Levels as the inner loops want them: the value of a kept weight is base + sum of the steps whose border it
/// exceeds.
struct LevelSteps {
  float base = 0;
  std::array<float, kMaxLevels - 1> border{}, step{};
  int count = 1;
  /// `placed`: the levels that decide which one a latent belongs to.
  LevelSteps(const std::vector<float>& levels, const std::vector<float>& placed)
      : base(levels[0]), count(static_cast<int>(levels.size())) {
    border.fill(std::numeric_limits<float>::infinity());
    for (int l = 0; l + 1 < count; ++l) {
      border[l] = (placed[l] + placed[l + 1]) / 2;
      step[l] = levels[l + 1] - levels[l];
    }
  }
  /// `x` where a latent is on level `l`, else 0. (g++ 12 takes lanes one by one where `level() == l` is
  /// asked.)
  STBLLM_INLINE Lanes where_level_is(int l, Lanes latent, Lanes x) const {
    const Lanes zero = {};
    if (l > 0) x = magnitude_of(latent) > border[l - 1] ? x : zero;
    if (l + 1 < count) x = magnitude_of(latent) > border[l] ? zero : x;
    return x;
  }
  STBLLM_INLINE IntLanes level(Lanes latent) const {
    IntLanes level = {};
    for (const float b : border) level -= magnitude_of(latent) > b;  // a comparison that holds gives -1
    return level;
  }
  STBLLM_INLINE Lanes value(Lanes latent) const {
    Lanes v = base + Lanes{};
    for (int l = 0; l < kMaxLevels - 1; ++l)
      v += magnitude_of(latent) > border[l] ? step[l] + Lanes{} : Lanes{};
    return (Lanes)((IntLanes)v | ((IntLanes)latent & INT32_MIN));
  }
};

/// The neighbours j + 1, j + 2, .. of each lane j in its group of M, the last one before the first; `wrapped`
/// where that is an earlier one.
template <int M>
struct Rotations {
  std::array<LaneIndex, M> partner{}, wrapped{};
  constexpr Rotations() {
    for (int r = 1; r < M; ++r)
      for (int j = 0; j < kLanes; ++j) {
        partner[r][j] = j / M * M + (j + r) % M;
        wrapped[r][j] = partner[r][j] < j ? -1 : 0;
      }
  }
};
template <int M>
constexpr Rotations<M> kRotations;

/// -1 for the `keep` largest magnitudes of each group of M, the earlier column first among equals, else 0.
/// The last group of a row may be narrower than M: what lies behind it counts as zeros.
template <int M>
STBLLM_INLINE IntLanes keep_largest(Lanes latent, int keep) {
  const Lanes magnitude = magnitude_of(latent);
  IntLanes before = {};  // how many of the group come first
  for (int r = 1; r < M; ++r) {
    const Lanes other = shuffle(magnitude, kRotations<M>.partner[r]);
    IntLanes wrapped;
    std::memcpy(&wrapped, kRotations<M>.wrapped[r].data(), sizeof(wrapped));
    before -= (other > magnitude) | ((other == magnitude) & wrapped);
  }
  return before < keep;
}

/// Numbers of the products' dtype: float, or uint16_t where that is bfloat16.
struct Products {
  void* data;
  bool bfloat16;

  STBLLM_INLINE Lanes load(int64_t first, int count) const {
    return bfloat16 ? load_bfloat16_lanes(static_cast<const uint16_t*>(data) + first, count)
                    : load_lanes(static_cast<const float*>(data) + first, count);
  }
  STBLLM_INLINE void store(int64_t first, Lanes x, int count) const {
    if (bfloat16)
      store_bfloat16_lanes(static_cast<uint16_t*>(data) + first, round_to_bfloat16(x), count);
    else
      store_lanes(static_cast<float*>(data) + first, x, count);
  }
};
Products products_of(const at::Tensor& tensor, int64_t first = 0) {
  return {static_cast<std::byte*>(tensor.data_ptr()) + first * static_cast<int64_t>(tensor.element_size()),
          tensor.scalar_type() == at::kBFloat16};
}

/// A row of a matrix in training.
struct Row {
  float* latent;
  uint16_t *mean, *square;  // bfloat16; null when codes stay
  Products values;          // the weights when projecting, their gradients when stepping
  const float* unit_scales;
  int8_t* symbols;  // null unless wanted
  int64_t cols;
  int column_block, keep;
  float gain;
};

/// Calls visit(first column, columns, scale) for at most kLanes columns under one scale at a time.
template <typename Visit>
STBLLM_INLINE void for_each_scaled_lanes(const Row& row, const Visit& visit) {
  for (int64_t block = 0, begin = 0; begin < row.cols; ++block, begin += row.column_block) {
    const int64_t end = std::min(row.cols, begin + row.column_block);
    const float scale = row.unit_scales[block] * row.gain;
    for_each_lanes(
        begin,
        end, [&](int64_t first, int count) __attribute__((always_inline)) { visit(first, count, scale); });
  }
}

template <int M>
STBLLM_INLINE void project_row_of(const Row& row, const LevelSteps& levels) {
  for_each_scaled_lanes(
      row, [&](int64_t first, int count, float scale) __attribute__((always_inline)) {
        const Lanes latent = load_lanes(row.latent + first, count);
        const IntLanes kept = keep_largest<M>(latent, row.keep);
        row.values.store(first, (Lanes)((IntLanes)(levels.value(latent) * scale) & kept), count);
        if (row.symbols == nullptr) return;
        const IntLanes symbol = (1 + levels.level(latent)) & kept;
        for (int j = 0; j < count; ++j)
          row.symbols[first + j] = static_cast<int8_t>(std::signbit(latent[j]) ? -symbol[j] : symbol[j]);
      });
}

/// Moves the latents; adds the row's share of the gradients of the levels' gains, whose sum is that of the
/// row's own gain.
template <int M>
STBLLM_INLINE void step_row_of(const Row& row, const LevelSteps& levels, const AdamStep& adam,
                               float* level_gradient) {
  Lanes sums[kMaxLevels] = {};
  for_each_scaled_lanes(
      row, [&](int64_t first, int count, float scale) __attribute__((always_inline)) {
        const Lanes latent = load_lanes(row.latent + first, count),
                    gradient = row.values.load(first, count) * scale;
        const IntLanes kept = keep_largest<M>(latent, row.keep);
        const Lanes share = (Lanes)((IntLanes)(gradient * levels.value(latent)) & kept);
        for (int l = 0; l < levels.count; ++l) sums[l] += levels.where_level_is(l, latent, share);
        if (row.mean == nullptr) return;
        Lanes mean = load_bfloat16_lanes(row.mean + first, count),
              square = load_bfloat16_lanes(row.square + first, count);
        store_lanes(row.latent + first, latent + adam(gradient, mean, square), count);
        store_bfloat16_lanes(row.mean + first, round_to_bfloat16(mean), count);
        store_bfloat16_lanes(row.square + first, round_to_bfloat16(square), count);
      });
  for (int l = 0; l < levels.count; ++l)
    for (int lane = 0; lane < kLanes; ++lane) level_gradient[l] += sums[l][lane];
}

STBLLM_CLONES void project_row_4(const Row& row, const LevelSteps& levels) { project_row_of<4>(row, levels); }
STBLLM_CLONES void project_row_8(const Row& row, const LevelSteps& levels) { project_row_of<8>(row, levels); }
STBLLM_CLONES void project_row_16(const Row& row, const LevelSteps& levels) {
  project_row_of<16>(row, levels);
}
STBLLM_CLONES void step_row_4(const Row& row, const LevelSteps& levels, const AdamStep& adam,
                              float* level_gradient) {
  step_row_of<4>(row, levels, adam, level_gradient);
}
STBLLM_CLONES void step_row_8(const Row& row, const LevelSteps& levels, const AdamStep& adam,
                              float* level_gradient) {
  step_row_of<8>(row, levels, adam, level_gradient);
}
STBLLM_CLONES void step_row_16(const Row& row, const LevelSteps& levels, const AdamStep& adam,
                               float* level_gradient) {
  step_row_of<16>(row, levels, adam, level_gradient);
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
    : weight_(weight),
      train_codes_(train_codes),
      first_symbols_(weight.symbols),
      first_scales_(weight.scale_bits < 16 ? weight.row_scales : weight.scales) {
  STBLLM_CHECK(weight.nm.group == 4 || weight.nm.group == 8 || weight.nm.group == 16, "groups of {}",
               weight.nm.group);
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
  // A latent starts at the original weight, moved to where its symbol holds: what was a close call flips
  // early.
  const at::Tensor sign = weight.symbols.sign().to(at::kFloat), relative = original.to(at::kFloat) / scale;
  const float limit = kPrunedLimit * levels_[0];
  latent_ = relative.clamp(-limit, limit);
  for (size_t l = 0; l < levels_.size(); ++l) {
    const float low = (l == 0 ? limit : (levels_[l - 1] + levels_[l]) / 2) + kMargin * levels_[0];
    const float high = l + 1 == levels_.size() ? std::numeric_limits<float>::max()
                                               : (levels_[l] + levels_[l + 1]) / 2 - kMargin * levels_[0];
    latent_ = at::where(weight.symbols.abs().eq(static_cast<int64_t>(l) + 1),
                        sign * (relative * sign).clamp(low, high), latent_);
  }
  if (weight.has_outliers()) {
    const at::Tensor columns = weight.outlier_columns.contiguous();
    outlier_columns_.assign(columns.data_ptr<int32_t>(), columns.data_ptr<int32_t>() + columns.numel());
    outlier_values_ = weight.outlier_values.t().contiguous();
    // What a code says of an outlier column does not count; it keeps saying it.
    for (const int32_t c : outlier_columns_)
      latent_.select(1, c).copy_(weight.symbols.select(1, c).sign() * levels_[0]);
  }
  latent_ = latent_.contiguous();
  row_gain_ = at::zeros({rows}, at::kFloat);
  level_gain_ = at::zeros({static_cast<int64_t>(levels_.size())}, at::kFloat);
  const auto moments = [](const at::Tensor& x, at::ScalarType dtype = at::kFloat) {
    return Moments{at::zeros_like(x, dtype), at::zeros_like(x, dtype)};
  };
  if (train_codes_) latent_moments_ = moments(latent_, at::kBFloat16);
  row_moments_ = moments(row_gain_);
  level_moments_ = moments(level_gain_);
  dense_ = at::empty({rows, cols}, fast_product_dtype());
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
  const int64_t cols = latent_.size(1), blocks = unit_scales_.size(1),
                outliers = static_cast<int64_t>(outlier_columns_.size());
  const at::Tensor dense = dense_.detach();
  at::parallel_for(0, latent_.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float gain = std::exp(row_gain_.const_data_ptr<float>()[r]);
      const Products values = products_of(dense, r * cols);
      project_row(weight_.nm.group,
                  {.latent = latent_.data_ptr<float>() + r * cols,
                   .mean = nullptr,
                   .square = nullptr,
                   .values = values,
                   .unit_scales = unit_scales_.data_ptr<float>() + r * blocks,
                   .symbols = symbols == nullptr ? nullptr : symbols + r * cols,
                   .cols = cols,
                   .column_block = weight_.column_block,
                   .keep = weight_.nm.keep,
                   .gain = gain},
                  levels);
      for (int64_t k = 0; k < outliers; ++k)
        values.store(outlier_columns_[k], Lanes{} + outlier_values_.data_ptr<float>()[r * outliers + k], 1);
    }
  });
}

void LatentWeight::step(const TuneRates& rates) {
  const at::Tensor gradient = dense_.grad().contiguous();
  const int64_t rows = latent_.size(0), cols = latent_.size(1), blocks = unit_scales_.size(1),
                level_count = level_gain_.numel();
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
      float* level_gradient = level_gradients.data_ptr<float>() + r * level_count;
      const auto moments = [&](const at::Tensor& of) {
        return codes ? static_cast<uint16_t*>(of.data_ptr()) + r * cols : nullptr;
      };
      step_row({.latent = latent_.data_ptr<float>() + r * cols,
                .mean = moments(latent_moments_.mean),
                .square = moments(latent_moments_.square),
                .values = products_of(gradient, r * cols),
                .unit_scales = unit_scales_.data_ptr<float>() + r * blocks,
                .symbols = nullptr,
                .cols = cols,
                .column_block = weight_.column_block,
                .keep = weight_.nm.keep,
                .gain = std::exp(log_gain)},
               levels, code_adam, level_gradient);
      const float gain_gradient = std::accumulate(level_gradient, level_gradient + level_count, 0.f);
      log_gain += gain_adam(gain_gradient, row_moments_.mean.data_ptr<float>()[r],
                            row_moments_.square.data_ptr<float>()[r]);
    }
  });
  if (level_count > 1) {
    const at::Tensor sums = level_gradients.sum(0, false, at::kDouble);
    for (int64_t l = 0; l < level_count; ++l)
      level_gain_.data_ptr<float>()[l] +=
          gain_adam(static_cast<float>(sums.data_ptr<double>()[l]), level_moments_.mean.data_ptr<float>()[l],
                    level_moments_.square.data_ptr<float>()[l]);
  }
  dense_.mutable_grad().reset();
  project();
}

void LatentWeight::visit_state(const std::string& name, const StateVisitor& visit) {
  const auto visit_parameter = [&](const char* part, at::Tensor& value, Moments& moments) {
    visit(name + part, value);
    visit(name + part + ".mean", moments.mean);
    visit(name + part + ".square", moments.square);
  };
  if (train_codes_) visit_parameter(".latent", latent_, latent_moments_);
  visit_parameter(".row_gain", row_gain_, row_moments_);
  visit_parameter(".level_gain", level_gain_, level_moments_);
}

void LatentWeight::resume(int64_t steps) {
  steps_ = steps;
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
