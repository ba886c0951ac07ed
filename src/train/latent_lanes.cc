// The steps of training as loops over lanes, sixteen neighbouring columns of a row. latent_tensors.cc is the
// readable twin.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "stbllm/base/lanes.h"
#include "stbllm/train/adam.h"
#include "stbllm/train/latent_state.h"

namespace stbllm::by_lanes {
namespace {

constexpr int kMaxLevels = 3;

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

/// The levels of now, and those that latents belong to.
LevelSteps level_steps(const LatentState& state) {
  const std::vector<float> now = state.levels_now();
  const float* start = state.levels.const_data_ptr<float>();
  return {now, state.train_codes ? now : std::vector<float>(start, start + state.levels.numel())};
}

}  // namespace

void project(const LatentState& state, const at::Tensor& symbols) {
  const LevelSteps levels = level_steps(state);
  const int64_t cols = state.latent.size(1), blocks = state.unit_scales.size(1),
                outliers = state.outlier_columns.numel();
  const at::Tensor dense = state.dense.detach();
  at::parallel_for(0, state.latent.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float gain = std::exp(state.row_gain.const_data_ptr<float>()[r]);
      const Products values = products_of(dense, r * cols);
      project_row(state.nm.group,
                  {.latent = state.latent.data_ptr<float>() + r * cols,
                   .mean = nullptr,
                   .square = nullptr,
                   .values = values,
                   .unit_scales = state.unit_scales.data_ptr<float>() + r * blocks,
                   .symbols = symbols.defined() ? symbols.data_ptr<int8_t>() + r * cols : nullptr,
                   .cols = cols,
                   .column_block = state.column_block,
                   .keep = state.nm.keep,
                   .gain = gain},
                  levels);
      for (int64_t k = 0; k < outliers; ++k)
        values.store(state.outlier_columns.const_data_ptr<int64_t>()[k],
                     Lanes{} + state.outlier_values.const_data_ptr<float>()[r * outliers + k], 1);
    }
  });
}

void step(const LatentState& state, const at::Tensor& gradient, const TuneRates& rates, int64_t number) {
  const AdamStep of_latents(rates.codes, number), of_gains(rates.gains, number);
  const bool move_latents = state.train_codes && rates.codes > 0;
  const int64_t rows = state.latent.size(0), cols = state.latent.size(1), blocks = state.unit_scales.size(1),
                level_count = state.level_gain.numel();
  const LevelSteps levels = level_steps(state);
  const at::Tensor level_gradients = at::zeros({rows, level_count}, at::kFloat);
  const int group = state.nm.group;
  const auto step_row = group == 4 ? step_row_4 : group == 8 ? step_row_8 : step_row_16;
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float& log_gain = state.row_gain.data_ptr<float>()[r];
      float* level_gradient = level_gradients.data_ptr<float>() + r * level_count;
      const auto moments = [&](const at::Tensor& of) {
        return move_latents ? static_cast<uint16_t*>(of.data_ptr()) + r * cols : nullptr;
      };
      step_row({.latent = state.latent.data_ptr<float>() + r * cols,
                .mean = moments(state.latent_moments.mean),
                .square = moments(state.latent_moments.square),
                .values = products_of(gradient, r * cols),
                .unit_scales = state.unit_scales.data_ptr<float>() + r * blocks,
                .symbols = nullptr,
                .cols = cols,
                .column_block = state.column_block,
                .keep = state.nm.keep,
                .gain = std::exp(log_gain)},
               levels, of_latents, level_gradient);
      const float gain_gradient = std::accumulate(level_gradient, level_gradient + level_count, 0.f);
      log_gain += of_gains(gain_gradient, state.row_moments.mean.data_ptr<float>()[r],
                           state.row_moments.square.data_ptr<float>()[r]);
    }
  });
  if (level_count == 1) return;
  const at::Tensor sums = level_gradients.sum(0, false, at::kDouble);
  for (int64_t l = 0; l < level_count; ++l)
    state.level_gain.data_ptr<float>()[l] += of_gains(static_cast<float>(sums.const_data_ptr<double>()[l]),
                                                      state.level_moments.mean.data_ptr<float>()[l],
                                                      state.level_moments.square.data_ptr<float>()[l]);
}

}  // namespace stbllm::by_lanes
