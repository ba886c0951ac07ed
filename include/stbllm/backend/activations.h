#pragma once
// Activations one element at a time, for the reference, for the few outlier columns and for tests; and the
// check that every product begins with.

#include <cstdint>

#include "stbllm/backend/backend.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"

namespace stbllm {

inline float load_element(const ActivationView& view, int64_t index) {
  if (view.type == ElementType::kFloat32) return static_cast<const float*>(view.data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(view.data)[index];
  return view.type == ElementType::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

inline void store_element(const ActivationView& view, int64_t index, float value) {
  if (view.type == ElementType::kFloat32)
    static_cast<float*>(view.data)[index] = value;
  else
    static_cast<uint16_t*>(view.data)[index] =
        view.type == ElementType::kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
}

/// Throws Error(kMismatch) unless x is (tokens, cols) and y (tokens, rows) with at least one token.
inline void check_activations(int64_t rows, int64_t cols, const ActivationView& x, const ActivationView& y) {
  if (x.width != cols || y.width != rows || x.tokens != y.tokens || x.tokens < 1)
    fail(ErrorCode::kMismatch,
         "activations ({}, {}) and result ({}, {}) do not fit a packed matrix of {} rows and {} columns",
         x.tokens, x.width, y.tokens, y.width, rows, cols);
}

}  // namespace stbllm
