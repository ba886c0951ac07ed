#pragma once
// Rows of float, or of uint16_t for bfloat16, as lanes: what templates over both types call.

#include <type_traits>

#include "stbllm/base/lanes.h"

namespace stbllm {

STBLLM_INLINE Lanes load(const float* from, int count) { return load_lanes(from, count); }
STBLLM_INLINE Lanes load(const uint16_t* from, int count) { return load_bfloat16_lanes(from, count); }
STBLLM_INLINE void store(float* to, Lanes x, int count) { store_lanes(to, x, count); }
STBLLM_INLINE void store(uint16_t* to, Lanes rounded, int count) { store_bfloat16_lanes(to, rounded, count); }
/// To what T holds.
template <typename T>
STBLLM_INLINE Lanes rounded(Lanes x) {
  return std::is_same_v<T, float> ? x : round_to_bfloat16(x);
}

}  // namespace stbllm
