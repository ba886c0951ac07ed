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

/// Takes the square of a gradient, or a mean of such squares, into their moving average.
inline void update_square(float& square, float now) {
  square += static_cast<float>(1 - kSquareDecay) * (now - square);
}
inline void update_square(const at::Tensor& square, const at::Tensor& now) {
  square.add_((now - square).mul_(static_cast<float>(1 - kSquareDecay)));
}

/// The factors of step t (from 1), and the change of one parameter by it.
struct AdamStep {
  float rate, mean_correction, square_correction;
  AdamStep(double rate, int64_t t)
      : rate(static_cast<float>(rate)),
        mean_correction(static_cast<float>(1 / (1 - std::pow(kMeanDecay, t)))),
        square_correction(static_cast<float>(1 / (1 - std::pow(kSquareDecay, t)))) {}
  STBLLM_INLINE float operator()(float gradient, float& mean, float& square) const {
    mean += static_cast<float>(1 - kMeanDecay) * (gradient - mean);
    update_square(square, gradient * gradient);
    return -rate * (mean * mean_correction) / (std::sqrt(square * square_correction) + kAdamEpsilon);
  }
  /// The same for float32 tensors of one shape, on any device.
  at::Tensor operator()(const at::Tensor& gradient, const at::Tensor& mean, const at::Tensor& square) const {
    mean.add_((gradient - mean).mul_(static_cast<float>(1 - kMeanDecay)));
    update_square(square, gradient * gradient);
    return (mean * mean_correction).mul_(-rate).div_((square * square_correction).sqrt_().add_(kAdamEpsilon));
  }

  /// The same where the average of the gradient's squares is an estimate: no change exceeds the rate, as none
  /// does for long where each parameter has an average of its own.
  template <typename Lanes>
  STBLLM_INLINE Lanes with_square(const Lanes& gradient, Lanes& mean, const Lanes& square) const {
    mean += static_cast<float>(1 - kMeanDecay) * (gradient - mean);
    Lanes quotient = (mean * mean_correction) / (sqrt_of(square * square_correction) + kAdamEpsilon);
    const Lanes one = Lanes{} + 1.f;
    quotient = select(quotient > one, one, quotient);
    quotient = select(quotient < -one, -one, quotient);
    return -rate * quotient;
  }
  at::Tensor with_square(const at::Tensor& gradient, const at::Tensor& mean, const at::Tensor& square) const {
    mean.add_((gradient - mean).mul_(static_cast<float>(1 - kMeanDecay)));
    return (mean * mean_correction)
        .div_((square * square_correction).sqrt_().add_(kAdamEpsilon))
        .clamp_(-1, 1)
        .mul_(-rate);
  }
};

}  // namespace stbllm
