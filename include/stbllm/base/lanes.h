#pragma once
// Sixteen numbers side by side, so that the compiler turns inner loops into vector code for each instruction
// set. Everything is inlined always, so that files compiled for different machines may share it. The
// quantizer runs over this many rows in lockstep: no result depends on how rows are split over threads.

#include <array>
#include <cstdint>
#include <cstring>

namespace stbllm {

inline constexpr int kLanes = 16;

/// Compiles a function for AVX-512, AVX2 and the baseline; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define STBLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STBLLM_CLONES
#endif
#define STBLLM_INLINE inline __attribute__((always_inline))

/// kLanes neighbours in memory: one vector register, or a few. A comparison gives -1 where it holds, else 0.
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * kLanes)));

STBLLM_INLINE Lanes load_lanes(const float* from, int count = kLanes) {  // zeros behind `count`
  Lanes x = {};
  std::memcpy(&x, from, sizeof(float) * count);
  return x;
}
STBLLM_INLINE void store_lanes(float* to, Lanes x, int count = kLanes) {
  std::memcpy(to, &x, sizeof(float) * count);
}
/// Calls visit(first, count) for neighbours from `begin` to `end`: kLanes of them, a constant to the
/// compiler, then the rest.
template <typename Visit>
STBLLM_INLINE void for_each_lanes(int64_t begin, int64_t end, const Visit& visit) {
  for (; begin + kLanes <= end; begin += kLanes) visit(begin, kLanes);
  if (begin < end) visit(begin, static_cast<int>(end - begin));
}

/// Sixteen bytes with their signs. By way of words: g++ 12 takes lanes one by one where they grow fourfold at
/// once.
STBLLM_INLINE IntLanes load_byte_lanes(const int8_t* from) {
  using ByteLanes = int8_t __attribute__((vector_size(kLanes)));
  using SignedWordLanes = int16_t __attribute__((vector_size(2 * kLanes)));
  ByteLanes bytes;
  std::memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(__builtin_convertvector(bytes, SignedWordLanes), IntLanes);
}

STBLLM_INLINE void store_byte_lanes(int8_t* to, IntLanes x) {
  using ByteLanes = int8_t __attribute__((vector_size(kLanes)));
  using SignedWordLanes = int16_t __attribute__((vector_size(2 * kLanes)));
  const ByteLanes bytes = __builtin_convertvector(__builtin_convertvector(x, SignedWordLanes), ByteLanes);
  std::memcpy(to, &bytes, sizeof(bytes));
}

/// Sixteen words, as bfloat16 numbers or nibbles come.
using WordLanes = uint16_t __attribute__((vector_size(2 * kLanes)));

STBLLM_INLINE Lanes load_bfloat16_lanes(const uint16_t* from, int count = kLanes) {  // zeros behind `count`
  WordLanes words = {};
  std::memcpy(&words, from, sizeof(uint16_t) * count);
  return (Lanes)(__builtin_convertvector(words, IntLanes) << 16);
}
/// To nearest even; NaN stays NaN.
STBLLM_INLINE Lanes round_to_bfloat16(Lanes x) {
  const IntLanes bits = (IntLanes)x, up = (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff, nan = bits | 0x400000;
  return (Lanes)(x == x ? up : nan);
}
STBLLM_INLINE void store_bfloat16_lanes(uint16_t* to, Lanes rounded, int count = kLanes) {
  const WordLanes words = __builtin_convertvector((IntLanes)rounded >> 16 & 0xffff, WordLanes);
  std::memcpy(to, &words, sizeof(uint16_t) * count);
}
/// The four bits of each word from bit 4 * k on.
STBLLM_INLINE IntLanes nibbles_of(WordLanes words, int k) {
  return __builtin_convertvector(words, IntLanes) >> 4 * k & 15;
}
/// Byte k of each number, with its sign.
STBLLM_INLINE IntLanes signed_bytes_of(IntLanes x, int k) { return x << (24 - 8 * k) >> 24; }

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
/// e^x within 3 ulp; 0 below -87, infinity above 88.3. NaN stays NaN.
STBLLM_INLINE Lanes exp_of(Lanes x) {
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts, the first of so few bits that n times it is
  // exact.
  constexpr float kRound = 0x1.8p23f;  // added, it leaves an integer in the lowest bits
  const Lanes lowest = Lanes{} - 88.f, bounded_below = x < -88.f ? lowest : x;
  const Lanes shifted = bounded_below * 1.44269504f + kRound, n = shifted - kRound;
  const Lanes r = bounded_below - n * 0.693359375f + n * 2.12194440e-4f;
  const Lanes series =
      1 + r + r * r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720)))));
  const IntLanes exponent = ((IntLanes)shifted - 0x4b400000 + 127) << 23;  // of kRound's bits
  const Lanes zero = {}, result = series * (Lanes)exponent;
  const Lanes bounded = x > 88.3f ? zero + __builtin_inff() : result;
  return x < -87.f ? zero : bounded;
}
STBLLM_INLINE Lanes magnitude_of(Lanes x) { return (Lanes)((IntLanes)x & 0x7fffffff); }

}  // namespace stbllm
