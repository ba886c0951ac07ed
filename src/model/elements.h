#pragma once
// Elements in memory are float, or uint16_t where they are bfloat16. These overloads let one template serve
// both: it computes in float32 lanes, rounds to what an element holds, and stores that.

#include <bit>
#include <cstdint>
#include <type_traits>

#include "stbllm/base/lanes.h"

namespace stbllm {

template <typename Lanes>
STBLLM_INLINE Lanes load(const float* from, int count) {
  return load_lanes<Lanes>(from, count);
}
template <typename Lanes>
STBLLM_INLINE Lanes load(const uint16_t* from, int count) {
  return load_bfloat16_lanes<Lanes>(from, count);
}
/// The same with `filler` behind them in place of zeros.
template <typename Lanes, typename T>
STBLLM_INLINE Lanes load_or(const T* from, int count, float filler) {
  const Lanes x = load<Lanes>(from, count);
  if (count == kLanes) return x;
  float values[kLanes];
  store_lanes(values, x);
  for (int i = count; i < kLanes; ++i) values[i] = filler;
  return load_lanes<Lanes>(values);
}
template <typename Lanes>
STBLLM_INLINE void store(float* to, const Lanes& x, int count) {
  store_lanes(to, x, count);
}
template <typename Lanes>
STBLLM_INLINE void store(uint16_t* to, const Lanes& rounded, int count) {
  store_bfloat16_lanes(to, rounded, count);
}
/// For a single element that lanes do not reach.
STBLLM_INLINE void store(float* to, float x) { *to = x; }
STBLLM_INLINE void store(uint16_t* to, float rounded) {
  *to = static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16);
}
/// The nearest numbers that elements of type T hold; store() takes nothing else.
template <typename T, typename Lanes>
STBLLM_INLINE Lanes rounded(const Lanes& x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return round_to_bfloat16(x);
}

}  // namespace stbllm
