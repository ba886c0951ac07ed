#pragma once
// What the head of the dense model reads.

#include "stbllm/calibrate/calibration.h"
#include "stbllm/model/decoder.h"

namespace stbllm {

/// Tokens behind the H of a head; four times as many change nothing on SmolLM2-135M.
inline constexpr int64_t kHeadTokens = 8192;

/// H (width, width) of what the head of a dense decoder multiplies, over the first kHeadTokens of the windows
/// behind H, in host memory. Every process that has all windows gets the same.
at::Tensor head_hessian(const Decoder& dense, const Calibration& calibration);

}  // namespace stbllm
