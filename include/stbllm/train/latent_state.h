#pragma once
// The parameters of a linear in training, and the two steps that work on them, each written twice: by_lanes
// as vector code for the CPU, and by_tensors as operations of libtorch for any device. tests/train compares
// them.
//
// With a latent value v of each weight, in units of its scale, and a gain of each row and level,
//
//   kept    v is one of the N largest of its group of M; the earlier column comes first among equals
//   level   the one whose value is nearest to |v|
//   weight  sign(v) * value of the level * scale of row and column block * gain of the row, or 0 if not kept
//
// and the gradient of a weight goes to its latent as if nothing was rounded.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "stbllm/quantize/binarized_weight.h"

namespace stbllm {

/// Adam's steps for the two kinds of parameters.
struct TuneRates {
  double gains = 0;  ///< logarithms of row scales and levels
  double codes = 0;  ///< latents, in units of the scale; 0: codes stay
};

/// Adam's two moving averages, in the shape of a parameter.
struct Moments {
  at::Tensor mean, square;
};

/// All tensors lie on one device.
struct LatentState {
  /// As `weight` is quantized: lean, and on the CPU. The device is that of `original` (rows, cols), which
  /// places pruned weights. Without `train_codes` levels stay where they were for the latents.
  LatentState(const BinarizedWeight& weight, const at::Tensor& original, bool train_codes);

  NmPattern nm;
  int column_block;
  bool train_codes;
  at::Tensor levels;       // (levels): their values at the start
  at::Tensor unit_scales;  // (rows, column blocks): of level 1, before the gain of the row
  float latent_step;       // what one of `latent` is worth
  at::Tensor latent;       // (rows, cols) int16: v in steps, rounded by chance (stochastic_rounding.h)
  at::Tensor row_gain;     // (rows): logarithm of a factor
  at::Tensor level_gain;   // (levels): logarithm of a factor; stays 0 when there is one level
  /// Of the latents' gradients, undefined without train_codes: their moving average (rows, cols) in bfloat16,
  /// and those of their mean squares over each row (rows) and each column (cols). A gradient is a sum of
  /// products of an output's and an input's numbers, so that the average of its square is nearly the product
  /// of the two over the mean of one: Adafactor (Shazeer and Stern, 2018).
  at::Tensor latent_mean, row_square, column_square;
  Moments row_moments, level_moments;  // of the gains
  at::Tensor outlier_columns;          // int64 (outliers), perhaps none
  at::Tensor outlier_values;           // (rows, outliers)
  at::Tensor dense;  // (rows, cols): the weights of the forward pass, in fast_product_dtype()

  /// v (rows, cols) in float32.
  at::Tensor latents() const;
  /// The values of the levels now, on the CPU.
  std::vector<float> levels_now() const;
};

namespace by_lanes {

/// Fills dense and, where it is defined, `symbols`, int8 (rows, cols).
void project(const LatentState& state, const at::Tensor& symbols);
/// Step `number`, from 1: moves the parameters against `gradient` of dense, which is contiguous and zero in
/// outlier columns.
void step(const LatentState& state, const at::Tensor& gradient, const TuneRates& rates, int64_t number);

}  // namespace by_lanes

namespace by_tensors {

/// Numbers from [0, 1) for each place of `like` (rows, cols), float32, which count along the rows: those of
/// stochastic_rounding.h.
at::Tensor rounding_chances(uint32_t seed, const at::Tensor& like);

void project(const LatentState& state, const at::Tensor& symbols);
void step(const LatentState& state, const at::Tensor& gradient, const TuneRates& rates, int64_t number);

}  // namespace by_tensors

}  // namespace stbllm
