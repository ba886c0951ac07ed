#pragma once
// Adam (Kingma and Ba, 2015) for parameters of our own layout.

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>

#include "stbllm/base/lanes.h"

namespace stbllm {

inline constexpr double kMeanDecay = 0.9, kSquareDecay = 0.95;
/// Far below any gradient that matters: steps do not depend on the scale of the loss.
inline constexpr float kAdamEpsilon = 1e-12f;

/// The factors of step t (from 1), and the change of one parameter by it.
struct AdamStep {
  float rate, mean_correction, square_correction;
  AdamStep(double rate, int64_t t)
      : rate(static_cast<float>(rate)),
        mean_correction(static_cast<float>(1 / (1 - std::pow(kMeanDecay, t)))),
        square_correction(static_cast<float>(1 / (1 - std::pow(kSquareDecay, t)))) {}
  STBLLM_INLINE float operator()(float gradient, float& mean, float& square) const {
    mean += static_cast<float>(1 - kMeanDecay) * (gradient - mean);
    square += static_cast<float>(1 - kSquareDecay) * (gradient * gradient - square);
    return -rate * (mean * mean_correction) / (std::sqrt(square * square_correction) + kAdamEpsilon);
  }
  STBLLM_INLINE Lanes operator()(Lanes gradient, Lanes& mean, Lanes& square) const {
    mean += static_cast<float>(1 - kMeanDecay) * (gradient - mean);
    square += static_cast<float>(1 - kSquareDecay) * (gradient * gradient - square);
    return -rate * (mean * mean_correction) / (sqrt_of(square * square_correction) + kAdamEpsilon);
  }
  /// The same for float32 tensors of one shape, on any device.
  at::Tensor operator()(const at::Tensor& gradient, const at::Tensor& mean, const at::Tensor& square) const {
    mean.add_((gradient - mean).mul_(static_cast<float>(1 - kMeanDecay)));
    square.add_((gradient * gradient).sub_(square).mul_(static_cast<float>(1 - kSquareDecay)));
    return (mean * mean_correction).mul_(-rate).div_((square * square_correction).sqrt_().add_(kAdamEpsilon));
  }
};

}  // namespace stbllm
