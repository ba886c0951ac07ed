#pragma once
// Elements in memory are float, or uint16_t where they are bfloat16. These overloads let one template serve
// both: it computes in float32 lanes, rounds to what an element holds, and stores that.

#include <bit>
#include <cstdint>
#include <type_traits>

#include "stbllm/base/lanes.h"

namespace stbllm {

STBLLM_INLINE Lanes load(const float* from, int count) { return load_lanes(from, count); }
STBLLM_INLINE Lanes load(const uint16_t* from, int count) { return load_bfloat16_lanes(from, count); }
/// The same with `filler` behind them in place of zeros.
template <typename T>
STBLLM_INLINE Lanes load_or(const T* from, int count, float filler) {
  Lanes x = load(from, count);
  for (int i = count; i < kLanes; ++i) x[i] = filler;
  return x;
}
STBLLM_INLINE void store(float* to, Lanes x, int count) { store_lanes(to, x, count); }
STBLLM_INLINE void store(uint16_t* to, Lanes rounded, int count) { store_bfloat16_lanes(to, rounded, count); }
/// For a single element that lanes do not reach.
STBLLM_INLINE void store(float* to, float x) { *to = x; }
STBLLM_INLINE void store(uint16_t* to, float rounded) {
  *to = static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16);
}
/// The nearest numbers that elements of type T hold; store() takes nothing else.
template <typename T>
STBLLM_INLINE Lanes rounded(Lanes x) {
  return std::is_same_v<T, float> ? x : round_to_bfloat16(x);
}

STBLLM_INLINE float largest_of(Lanes x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

}  // namespace stbllm
