// The steps of training as operations of libtorch, in the order of latent_lanes.cc, so that both round alike
// up to fused multiplications. Nothing here makes the host wait for the device.

#include <ATen/ATen.h>

#include <limits>

#include "stbllm/train/adam.h"
#include "stbllm/train/latent_state.h"
#include "stbllm/train/stochastic_rounding.h"

namespace stbllm::by_tensors {

at::Tensor rounding_chances(uint32_t seed, const at::Tensor& like) {
  // Words of 32 bits in numbers of 64; the second factor is taken from 2^32 so that no product overflows.
  constexpr int64_t kWord = 0xffffffff, kFirst = 0x7feb352d, kSecond = int64_t{0x846ca68b} - kWord - 1;
  at::Tensor x = at::arange(like.numel(), like.options().dtype(at::kLong));
  x.bitwise_and_(kWord).bitwise_xor_(static_cast<int64_t>(seed));
  const auto mix = [&](int64_t shift) { x.bitwise_xor_(x.__rshift__(shift)); };
  mix(16);
  x.mul_(kFirst).bitwise_and_(kWord);
  mix(15);
  x.mul_(kSecond).bitwise_and_(kWord);
  mix(16);
  return x.__rshift__(8).to(at::kFloat).mul_(0x1p-24f).view(like.sizes());
}

namespace {

/// One number for each column block of a row -> for each column (rows, cols).
at::Tensor by_column(const LatentState& state, const at::Tensor& of_blocks) {
  const int64_t rows = of_blocks.size(0), blocks = of_blocks.size(1);
  return of_blocks.unsqueeze(2)
      .expand({rows, blocks, state.column_block})
      .reshape({rows, blocks * state.column_block})
      .narrow(1, 0, state.latent.size(1));
}

/// What each unit of a latent weighs, (rows, cols).
at::Tensor scales(const LatentState& state) {
  return by_column(state, state.unit_scales * state.row_gain.exp().unsqueeze(1));
}

/// Whether each of `magnitude` (rows, cols) is one of the N largest of its group. Behind the last column of a
/// row stand zeros.
at::Tensor keep_largest(const at::Tensor& magnitude, NmPattern nm) {
  const int64_t rows = magnitude.size(0), cols = magnitude.size(1),
                missing = (nm.group - cols % nm.group) % nm.group;
  const at::Tensor padded = missing == 0 ? magnitude : at::constant_pad_nd(magnitude, {0, missing});
  const at::Tensor groups = padded.reshape({rows, -1, nm.group});
  at::Tensor before = at::zeros(groups.sizes(), groups.options().dtype(at::kChar));  // how many come first
  for (int64_t distance = 1; distance < nm.group; ++distance) {
    const int64_t pairs = nm.group - distance;
    const at::Tensor later_first = groups.narrow(2, distance, pairs).gt(groups.narrow(2, 0, pairs));
    before.narrow(2, 0, pairs).add_(later_first);
    before.narrow(2, distance, pairs).add_(later_first.logical_not());
  }
  return before.lt(nm.keep).view({rows, -1}).narrow(1, 0, cols);
}

/// The levels as they are now: each a number on the device.
struct TensorLevels {
  std::vector<at::Tensor> values;   // ascending
  std::vector<at::Tensor> borders;  // between neighbouring levels

  explicit TensorLevels(const LatentState& state) {
    const at::Tensor now = state.levels * state.level_gain.exp(),
                     placed = state.train_codes ? now : state.levels;
    values = now.unbind();
    const int64_t count = now.size(0);
    if (count > 1) borders = ((placed.narrow(0, 0, count - 1) + placed.narrow(0, 1, count - 1)) / 2).unbind();
  }
  /// Of the latents whose magnitudes these are, with the sign of the latent.
  at::Tensor value(const at::Tensor& magnitude, const at::Tensor& latent) const {
    at::Tensor result = values[0].expand(magnitude.sizes());
    for (size_t l = 0; l < borders.size(); ++l)
      result = result + magnitude.gt(borders[l]) * (values[l + 1] - values[l]);
    return at::copysign(result, latent);
  }
  /// Their indices, int8.
  at::Tensor level(const at::Tensor& magnitude) const {
    at::Tensor result = at::zeros(magnitude.sizes(), magnitude.options().dtype(at::kChar));
    for (const at::Tensor& border : borders) result.add_(magnitude.gt(border));
    return result;
  }
};

}  // namespace

void project(const LatentState& state, const at::Tensor& symbols) {
  const TensorLevels levels(state);
  const at::Tensor latent = state.latents(), magnitude = latent.abs(),
                   kept = keep_largest(magnitude, state.nm);
  const at::Tensor dense = state.dense.detach();
  dense.copy_(at::where(kept, levels.value(magnitude, latent) * scales(state), 0));
  if (state.outlier_columns.numel() > 0)
    dense.index_copy_(1, state.outlier_columns, state.outlier_values.to(dense.scalar_type()));
  if (!symbols.defined()) return;
  const at::Tensor symbol = (levels.level(magnitude) + 1) * kept;
  symbols.copy_(at::where(latent.signbit(), -symbol, symbol));
}

void step(const LatentState& state, const at::Tensor& gradient, const TuneRates& rates, int64_t number) {
  const AdamStep of_latents(rates.codes, number), of_gains(rates.gains, number);
  const bool move_latents = state.train_codes && rates.codes > 0;
  const TensorLevels levels(state);
  const at::Tensor latent = state.latents(), magnitude = latent.abs(),
                   of_latent = gradient.to(at::kFloat) * scales(state);
  const at::Tensor share =
      at::where(keep_largest(magnitude, state.nm), of_latent * levels.value(magnitude, latent), 0);
  at::Tensor of_level;  // (rows, levels)
  if (levels.borders.empty()) {
    of_level = share.sum(1, /*keepdim=*/true);
  } else {
    const at::Tensor level = levels.level(magnitude);
    std::vector<at::Tensor> sums;
    for (size_t l = 0; l < levels.values.size(); ++l)
      sums.push_back(at::where(level.eq(static_cast<int64_t>(l)), share, 0).sum(1));
    of_level = at::stack(sums, 1);
  }
  if (move_latents) {
    const at::Tensor squares = of_latent.square();
    update_square(state.row_square, squares.mean(1));
    update_square(state.column_square, squares.mean(0));
    const at::Tensor row_mean = state.row_square.mean(), mean = state.latent_mean.to(at::kFloat);
    const at::Tensor share = at::where(row_mean.gt(0), state.row_square / row_mean, 0);
    const at::Tensor moved =
        latent + of_latents.with_square(of_latent, mean, share.unsqueeze(1) * state.column_square);
    constexpr int kLimit = std::numeric_limits<int16_t>::max();
    state.latent.copy_((moved / state.latent_step + rounding_chances(rounding_seed(number), state.latent))
                           .clamp_(-kLimit, kLimit)
                           .floor_());
    state.latent_mean.copy_(mean);
  }
  state.row_gain.add_(of_gains(of_level.sum(1), state.row_moments.mean, state.row_moments.square));
  if (state.level_gain.numel() > 1)
    state.level_gain.add_(of_gains(of_level.sum(0, false, at::kDouble).to(at::kFloat),
                                   state.level_moments.mean, state.level_moments.square));
}

}  // namespace stbllm::by_tensors
