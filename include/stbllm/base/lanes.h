#pragma once
// Sixteen numbers side by side, from which the compiler makes vector code for each instruction set. All
// functions are always inlined, so that files compiled for different machines may share them. The quantizer
// works on this many rows in lockstep, so that no result depends on how rows are split over threads.

#include <array>
#include <cstdint>
#include <cstring>

namespace stbllm {

inline constexpr int kLanes = 16;

/// Compiles a function for AVX-512, AVX2 and the baseline; the loader picks one. With clang, and with address
/// sanitizing, there is the baseline only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define STBLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STBLLM_CLONES
#endif
#define STBLLM_INLINE inline __attribute__((always_inline))

/// kLanes numbers that are neighbours in memory, in one vector register or in several. A comparison of two
/// gives -1 in each lane where it holds, and 0 in the others.
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * kLanes)));

/// The first `count` numbers at `from`, then zeros.
STBLLM_INLINE Lanes load_lanes(const float* from, int count = kLanes) {
  Lanes x = {};
  std::memcpy(&x, from, sizeof(float) * count);
  return x;
}
/// Writes the first `count` lanes.
STBLLM_INLINE void store_lanes(float* to, Lanes x, int count = kLanes) {
  std::memcpy(to, &x, sizeof(float) * count);
}
/// Calls visit(first, count) for all indices from `begin` to `end`: kLanes at a time, a count that the
/// compiler sees as a constant, then once for the rest.
template <typename Visit>
STBLLM_INLINE void for_each_lanes(int64_t begin, int64_t end, const Visit& visit) {
  for (; begin + kLanes <= end; begin += kLanes) visit(begin, kLanes);
  if (begin < end) visit(begin, static_cast<int>(end - begin));
}

/// Sixteen signed 16-bit numbers.
using SignedWordLanes = int16_t __attribute__((vector_size(2 * kLanes)));

/// Sixteen signed bytes. They become 16-bit numbers first, because g++ 12 takes lanes one by one where their
/// size grows fourfold at once.
STBLLM_INLINE IntLanes load_byte_lanes(const int8_t* from) {
  using ByteLanes = int8_t __attribute__((vector_size(kLanes)));
  ByteLanes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, SignedWordLanes), IntLanes);
}

/// Writes the lowest byte of each lane.
STBLLM_INLINE void store_byte_lanes(int8_t* to, IntLanes x) {
  using ByteLanes = int8_t __attribute__((vector_size(kLanes)));
  const ByteLanes bytes = __builtin_convertvector(__builtin_convertvector(x, SignedWordLanes), ByteLanes);
  std::memcpy(to, &bytes, sizeof(bytes));
}

/// Sixteen 16-bit words, which hold bfloat16 numbers or four nibbles each.
using WordLanes = uint16_t __attribute__((vector_size(2 * kLanes)));

/// The first `count` bfloat16 numbers at `from`, then zeros.
STBLLM_INLINE Lanes load_bfloat16_lanes(const uint16_t* from, int count = kLanes) {
  WordLanes words = {};
  std::memcpy(&words, from, sizeof(uint16_t) * count);
  return (Lanes)(__builtin_convertvector(words, IntLanes) << 16);
}
/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
STBLLM_INLINE Lanes round_to_bfloat16(Lanes x) {
  const IntLanes bits = (IntLanes)x, up = (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff, nan = bits | 0x400000;
  return (Lanes)(x == x ? up : nan);
}
/// Writes the first `count` of numbers that are bfloat16 numbers already.
STBLLM_INLINE void store_bfloat16_lanes(uint16_t* to, Lanes rounded, int count = kLanes) {
  const WordLanes words = __builtin_convertvector((IntLanes)rounded >> 16 & 0xffff, WordLanes);
  std::memcpy(to, &words, sizeof(uint16_t) * count);
}
/// The first `count` signed 16-bit numbers at `from`, then zeros.
STBLLM_INLINE IntLanes load_short_lanes(const int16_t* from, int count = kLanes) {
  SignedWordLanes words = {};
  std::memcpy(&words, from, sizeof(int16_t) * count);
  return __builtin_convertvector(words, IntLanes);
}
/// Writes the lower half of the first `count` lanes.
STBLLM_INLINE void store_short_lanes(int16_t* to, IntLanes x, int count = kLanes) {
  const SignedWordLanes words = __builtin_convertvector(x, SignedWordLanes);
  std::memcpy(to, &words, sizeof(int16_t) * count);
}
/// Nibble k of each word: its four bits from bit 4 * k on.
STBLLM_INLINE IntLanes nibbles_of(WordLanes words, int k) {
  return __builtin_convertvector(words, IntLanes) >> 4 * k & 15;
}
/// Byte k of each number, as a signed number.
STBLLM_INLINE IntLanes signed_bytes_of(IntLanes x, int k) { return x << (24 - 8 * k) >> 24; }

/// For each lane the lane that its number comes from.
using LaneIndex = std::array<int32_t, kLanes>;
STBLLM_INLINE Lanes shuffle(Lanes x, const LaneIndex& from) {
#if defined(__clang__)
  Lanes y;
  for (int j = 0; j < kLanes; ++j) y[j] = x[from[j]];
  return y;
#else
  IntLanes index;
  std::memcpy(&index, from.data(), sizeof(index));
  return __builtin_shuffle(x, index);
#endif
}
/// The sum of all lanes, added as a tree: halves, quarters, pairs, neighbours.
STBLLM_INLINE float sum_of(Lanes x) {
  constexpr LaneIndex kEights = {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7};
  constexpr LaneIndex kFours = {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11};
  constexpr LaneIndex kTwos = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
  constexpr LaneIndex kOnes = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
  x += shuffle(x, kEights);
  x += shuffle(x, kFours);
  x += shuffle(x, kTwos);
  x += shuffle(x, kOnes);
  return x[0];
}
/// e^x within three units in the last place; 0 below -87, infinity above 88.3. NaN stays NaN.
STBLLM_INLINE Lanes exp_of(Lanes x) {
  // With x = n ln 2 + r and |r| <= ln 2 / 2, e^x is 2^n times a series of r. ln 2 is subtracted in two parts,
  // the first of so few bits that n times it is exact.
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the rounded number in the lowest bits
  const Lanes lowest = Lanes{} - 88.f, bounded_below = x < -88.f ? lowest : x;
  const Lanes shifted = bounded_below * 1.44269504f + kRound, n = shifted - kRound;
  const Lanes r = bounded_below - n * 0.693359375f + n * 2.12194440e-4f;
  const Lanes series =
      1 + r + r * r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720)))));
  const IntLanes exponent = ((IntLanes)shifted - 0x4b400000 + 127)
                            << 23;  // 0x4b400000 are the bits of kRound
  const Lanes zero = {}, result = series * (Lanes)exponent;
  const Lanes bounded = x > 88.3f ? zero + __builtin_inff() : result;
  return x < -87.f ? zero : bounded;
}
/// The square root of each number, rounded as IEEE asks.
STBLLM_INLINE Lanes sqrt_of(Lanes x) {
  float values[kLanes];
  std::memcpy(values, &x, sizeof x);
  for (float& value : values) value = __builtin_sqrtf(value);
  std::memcpy(&x, values, sizeof x);
  return x;
}
/// The magnitude of each number.
STBLLM_INLINE Lanes magnitude_of(Lanes x) { return (Lanes)((IntLanes)x & 0x7fffffff); }

}  // namespace stbllm
