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

#include "stbllm/base/bits.h"
#include "stbllm/base/lanes.h"
#include "stbllm/train/adam.h"
#include "stbllm/train/latent_state.h"
#include "stbllm/train/stochastic_rounding.h"

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
  template <typename Lanes>
  STBLLM_INLINE Lanes where_level_is(int l, const Lanes& latent, Lanes x) const {
    const Lanes zero = {};
    if (l > 0) x = select(magnitude_of(latent) > border[l - 1], x, zero);
    if (l + 1 < count) x = select(magnitude_of(latent) > border[l], zero, x);
    return x;
  }
  template <typename Lanes>
  STBLLM_INLINE IntLanes<Lanes> level(const Lanes& latent) const {
    IntLanes<Lanes> level = {};
    for (const float b : border) level -= magnitude_of(latent) > b;  // a comparison that holds gives -1
    return level;
  }
  template <typename Lanes>
  STBLLM_INLINE Lanes value(const Lanes& latent) const {
    const Lanes zero = {};
    Lanes v = zero + base;
    for (int l = 0; l < kMaxLevels - 1; ++l)
      v += select(magnitude_of(latent) > border[l], zero + step[l], zero);
    return with_signs_of(v, latent);
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
template <int M, typename Lanes>
STBLLM_INLINE IntLanes<Lanes> keep_largest(const Lanes& latent, int keep) {
  const Lanes magnitude = magnitude_of(latent);
  IntLanes<Lanes> before = {};  // how many of the group come first
  const auto count = [&]<int... R>(std::integer_sequence<int, R...>) STBLLM_INLINED {
    (
        [&]() STBLLM_INLINED {
          const Lanes other = shuffle<kRotations<M>.partner[R + 1]>(magnitude);
          const auto wrapped = load_vector<IntLanes<Lanes>>(kRotations<M>.wrapped[R + 1].data());
          before -= (other > magnitude) | ((other == magnitude) & wrapped);
        }(),
        ...);
  };
  count(std::make_integer_sequence<int, M - 1>());
  return before < keep;
}

/// Numbers of the products' dtype: float, or uint16_t where that is bfloat16.
struct Products {
  void* data;
  bool bfloat16;

  template <typename Lanes>
  STBLLM_INLINE Lanes load(int64_t first, int count) const {
    return bfloat16 ? load_bfloat16_lanes<Lanes>(static_cast<const uint16_t*>(data) + first, count)
                    : load_lanes<Lanes>(static_cast<const float*>(data) + first, count);
  }
  template <typename Lanes>
  STBLLM_INLINE void store(int64_t first, const Lanes& x, int count) const {
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
  int16_t* latent;
  float latent_step;
  Products values;  // the weights when projecting, their gradients when stepping
  const float* unit_scales;
  int8_t* symbols;  // null unless wanted
  int64_t cols;
  int column_block, keep;
  float gain;

  template <typename Lanes>
  STBLLM_INLINE Lanes latents(int64_t first, int count) const {
    return converted<float>(load_short_lanes<Lanes>(latent + first, count)) * latent_step;
  }
};

/// How the latents of a row move.
struct LatentMove {
  uint16_t* mean = nullptr;               // (cols) bfloat16; null when codes stay
  float row_square = 0;                   // of the row, over the mean of all rows
  const float* column_square = nullptr;   // (cols)
  uint32_t rounding_seed = 0, place = 0;  // of the row's first column
};

/// Calls visit(first column, columns, scale) for at most kLanes columns under one scale at a time.
template <typename Visit>
STBLLM_INLINE void for_each_scaled_lanes(const Row& row, const Visit& visit) {
  for (int64_t block = 0, begin = 0; begin < row.cols; ++block, begin += row.column_block) {
    const int64_t end = std::min(row.cols, begin + row.column_block);
    const float scale = row.unit_scales[block] * row.gain;
    for_each_lanes(begin, end, [&](int64_t first, int count) STBLLM_INLINED { visit(first, count, scale); });
  }
}

template <int M, typename Lanes>
STBLLM_INLINE void project_row_of(const Row& row, const LevelSteps& levels) {
  for_each_scaled_lanes(row, [&](int64_t first, int count, float scale) STBLLM_INLINED {
    const Lanes latent = row.latents<Lanes>(first, count);
    const IntLanes<Lanes> kept = keep_largest<M>(latent, row.keep);
    row.values.store(first, masked<Lanes>(levels.value(latent) * scale, kept), count);
    if (row.symbols == nullptr) return;
    const IntLanes<Lanes> symbol = (1 + levels.level(latent)) & kept, sign = bits_as<int32_t>(latent) >> 31;
    int8_t symbols[kLanes];
    store_byte_lanes(symbols, (symbol ^ sign) - sign);
    std::copy_n(symbols, count, row.symbols + first);
  });
}

/// In steps, rounded up with the chance of what is left, within the range of 16 bits.
template <typename Lanes>
STBLLM_INLINE IntLanes<Lanes> round_latents(const Lanes& latent, float latent_step, const Lanes& chances) {
  constexpr float kLimit = std::numeric_limits<int16_t>::max();
  Lanes steps = latent / latent_step + chances;
  const Lanes zero = {}, limit = zero + kLimit;
  steps = select(steps > limit, limit, steps);
  steps = select(steps < -limit, -limit, steps);
  const IntLanes<Lanes> towards_zero = converted<int32_t>(steps);
  return towards_zero + (converted<float>(towards_zero) > steps);  // -1 where that was upwards
}

/// Moves the latents; adds the row's share of the gradients of the levels' gains, whose sum is that of the
/// row's own gain.
template <int M, typename Lanes>
STBLLM_INLINE void step_row_of(const Row& row, const LatentMove& move, const LevelSteps& levels,
                               const AdamStep& adam, float* level_gradient) {
  Lanes sums[kMaxLevels] = {};
  for_each_scaled_lanes(row, [&](int64_t first, int count, float scale) STBLLM_INLINED {
    const Lanes latent = row.latents<Lanes>(first, count),
                gradient = row.values.load<Lanes>(first, count) * scale;
    const IntLanes<Lanes> kept = keep_largest<M>(latent, row.keep);
    const Lanes share = masked<Lanes>(gradient * levels.value(latent), kept);
    for (int l = 0; l < kMaxLevels; ++l)
      if (l < levels.count) sums[l] += levels.where_level_is(l, latent, share);
    if (move.mean == nullptr) return;
    Lanes mean = load_bfloat16_lanes<Lanes>(move.mean + first, count);
    const Lanes square = load_lanes<Lanes>(move.column_square + first, count) * move.row_square;
    const Lanes moved = latent + adam.with_square(gradient, mean, square);
    const Lanes chances =
        rounding_chances<Lanes>(move.rounding_seed, move.place + static_cast<uint32_t>(first));
    store_short_lanes(row.latent + first, round_latents(moved, row.latent_step, chances), count);
    store_bfloat16_lanes(move.mean + first, round_to_bfloat16(mean), count);
  });
  for (int l = 0; l < kMaxLevels; ++l) {
    float lanes[kLanes];
    store_lanes(lanes, sums[l]);
    if (l < levels.count)
      for (const float lane : lanes) level_gradient[l] += lane;
  }
}

template <int M>
void project_row_with(const Row& row, const LevelSteps& levels) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { project_row_of<M, Lanes>(row, levels); });
}
template <int M>
void step_row_with(const Row& row, const LatentMove& move, const LevelSteps& levels, const AdamStep& adam,
                   float* level_gradient) {
  with_lanes([&]<typename Lanes>()
                 STBLLM_INLINED { step_row_of<M, Lanes>(row, move, levels, adam, level_gradient); });
}

void project_row(int group, const Row& row, const LevelSteps& levels) {
  (group == 4 ? project_row_with<4> : group == 8 ? project_row_with<8> : project_row_with<16>)(row, levels);
}

/// The levels of now, and those that latents belong to.
LevelSteps level_steps(const LatentState& state) {
  const std::vector<float> now = state.levels_now();
  const float* start = state.levels.const_data_ptr<float>();
  return {now, state.train_codes ? now : std::vector<float>(start, start + state.levels.numel())};
}

Row row_of(const LatentState& state, int64_t r, const Products& values) {
  const int64_t cols = state.latent.size(1), blocks = state.unit_scales.size(1);
  return {.latent = state.latent.data_ptr<int16_t>() + r * cols,
          .latent_step = state.latent_step,
          .values = values,
          .unit_scales = state.unit_scales.data_ptr<float>() + r * blocks,
          .symbols = nullptr,
          .cols = cols,
          .column_block = state.column_block,
          .keep = state.nm.keep,
          .gain = std::exp(state.row_gain.const_data_ptr<float>()[r])};
}

/// Adds the squares of a row's gradients to `column_sums` (cols), and returns their sum.
float add_squares(const Row& row, float* column_sums) {
  return with_lanes([&]<typename Lanes>() STBLLM_INLINED {
    Lanes sum = {};
    for_each_scaled_lanes(row, [&](int64_t first, int count, float scale) STBLLM_INLINED {
      const Lanes gradient = row.values.load<Lanes>(first, count) * scale, square = gradient * gradient;
      store_lanes(column_sums + first, load_lanes<Lanes>(column_sums + first, count) + square, count);
      sum += square;
    });
    return sum_of(sum);
  });
}

/// Takes the squares of a gradient into the averages of rows and columns. Returns the mean of those of the
/// rows.
double update_squares(const LatentState& state, const at::Tensor& gradient) {
  constexpr int64_t kRowsPerSum = 64;  // in an order that does not depend on the number of threads
  const int64_t rows = state.latent.size(0), cols = state.latent.size(1), parts = ceil_div(rows, kRowsPerSum);
  const at::Tensor part_sums = at::zeros({parts, cols}, at::kFloat);
  float* row_square = state.row_square.data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t r = p * kRowsPerSum; r < std::min(rows, (p + 1) * kRowsPerSum); ++r) {
        const float sum = add_squares(row_of(state, r, products_of(gradient, r * cols)),
                                      part_sums.data_ptr<float>() + p * cols);
        update_square(row_square[r], sum / static_cast<float>(cols));
      }
  });
  float* column_square = state.column_square.data_ptr<float>();
  at::parallel_for(0, cols, 256, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float sum = 0;
      for (int64_t p = 0; p < parts; ++p) sum += part_sums.const_data_ptr<float>()[p * cols + c];
      update_square(column_square[c], sum / static_cast<float>(rows));
    }
  });
  return std::accumulate(row_square, row_square + rows, 0.) / static_cast<double>(rows);
}

}  // namespace

void project(const LatentState& state, const at::Tensor& symbols) {
  const LevelSteps levels = level_steps(state);
  const int64_t cols = state.latent.size(1), outliers = state.outlier_columns.numel();
  const at::Tensor dense = state.dense.detach();
  at::parallel_for(0, state.latent.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const Products values = products_of(dense, r * cols);
      Row row = row_of(state, r, values);
      if (symbols.defined()) row.symbols = symbols.data_ptr<int8_t>() + r * cols;
      project_row(state.nm.group, row, levels);
      for (int64_t k = 0; k < outliers; ++k)
        values.store(state.outlier_columns.const_data_ptr<int64_t>()[k],
                     NativeLanes{} + state.outlier_values.const_data_ptr<float>()[r * outliers + k], 1);
    }
  });
}

void step(const LatentState& state, const at::Tensor& gradient, const TuneRates& rates, int64_t number) {
  const AdamStep of_latents(rates.codes, number), of_gains(rates.gains, number);
  const bool move_latents = state.train_codes && rates.codes > 0;
  const int64_t rows = state.latent.size(0), cols = state.latent.size(1),
                level_count = state.level_gain.numel();
  const LevelSteps levels = level_steps(state);
  const at::Tensor level_gradients = at::zeros({rows, level_count}, at::kFloat);
  const int group = state.nm.group;
  const auto step_row = group == 4 ? step_row_with<4> : group == 8 ? step_row_with<8> : step_row_with<16>;
  const double row_mean = move_latents ? update_squares(state, gradient) : 0;
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float& log_gain = state.row_gain.data_ptr<float>()[r];
      float* level_gradient = level_gradients.data_ptr<float>() + r * level_count;
      LatentMove move;
      if (move_latents)
        move = {.mean = static_cast<uint16_t*>(state.latent_mean.data_ptr()) + r * cols,
                .row_square =
                    row_mean > 0 ? static_cast<float>(state.row_square.data_ptr<float>()[r] / row_mean) : 0,
                .column_square = state.column_square.data_ptr<float>(),
                .rounding_seed = rounding_seed(number),
                .place = static_cast<uint32_t>(r * cols)};
      step_row(row_of(state, r, products_of(gradient, r * cols)), move, levels, of_latents, level_gradient);
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
