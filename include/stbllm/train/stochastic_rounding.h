#pragma once
// Rounding up or down by chance, so that steps smaller than what a number can hold add up to what they
// should. The chance is a hash of the number's place and of the step: the same on every device, and after a
// resume.

#include <array>
#include <cstdint>

#include "stbllm/base/lanes.h"

namespace stbllm {

/// What belongs to step `number`, to be combined with places.
inline uint32_t rounding_seed(int64_t number) { return static_cast<uint32_t>(number) * 0x9e3779b9u; }

/// Numbers from [0, 1), by the places from `first` on. The mixing of bits is lowbias32 (Chris Wellons,
/// "Prospecting for Hash Functions", 2018).
template <typename Lanes>
STBLLM_INLINE Lanes rounding_chances(uint32_t seed, uint32_t first) {
  using Words = LanesOf<Lanes, uint32_t>;
  constexpr std::array<uint32_t, kLanes> kPlaces = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Words x = (load_vector<Words>(kPlaces.data()) + first) ^ seed;
  x = x ^ x >> 16;
  x = x * 0x7feb352du;
  x = x ^ x >> 15;
  x = x * 0x846ca68bu;
  x = x ^ x >> 16;
  return converted<float>(bits_as<int32_t>(x >> 8)) * 0x1p-24f;
}

}  // namespace stbllm
