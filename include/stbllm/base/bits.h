#pragma once
// Bit streams, 16-bit floating-point numbers, and small pieces of integer arithmetic.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace stbllm {

/// a / b, rounded up; a >= 0, b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// The number in the `width` (0..57) bits that start at bit `offset` of `stream`, least significant bit
/// first. Bit 0 of a byte is its least significant. Only the bytes that hold those bits are read.
inline uint64_t read_bits(const std::byte* stream, int64_t offset, int width) {
  uint64_t value = 0;
  const int64_t first = offset >> 3, last = (offset + width + 7) >> 3;
  for (int64_t i = first; i < last; ++i) value |= static_cast<uint64_t>(stream[i]) << (8 * (i - first));
  return (value >> (offset & 7)) & ((uint64_t{1} << width) - 1);
}

/// Sets the `width` bits that start at bit `offset` of `stream` to `value`; all other bits stay as they are.
inline void write_bits(std::byte* stream, int64_t offset, int width, uint64_t value) {
  for (int done = 0; done < width;) {
    const int64_t byte = (offset + done) >> 3;
    const int shift = static_cast<int>((offset + done) & 7);
    const int count = width - done < 8 - shift ? width - done : 8 - shift;
    const unsigned mask = ((1u << count) - 1u) << shift;
    const unsigned bits = static_cast<unsigned>(value >> done) << shift & mask;
    stream[byte] = static_cast<std::byte>((static_cast<unsigned>(stream[byte]) & ~mask) | bits);
    done += count;
  }
}

// The conversions below are inlined always, because files that are compiled for different instruction sets
// share them: of an ordinary inline function the linker keeps one copy, which could be the one for the wrong
// machine.

/// IEEE binary16 -> binary32, exact.
inline __attribute__((always_inline)) float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#elif defined(__aarch64__)
  return static_cast<float>(__builtin_bit_cast(__fp16, h));
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) {  // subnormal: magnitude * 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return __builtin_bit_cast(float, sign | ((magnitude << 13) + 0x38000000u));
#endif
}

/// binary32 -> binary16, rounds to nearest even; overflow becomes infinity, NaN stays NaN.
inline __attribute__((always_inline)) uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return __builtin_bit_cast(uint16_t, static_cast<__fp16>(f));
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, f);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u) {  // below 2^-14: the float adder rounds to multiples of 2^-24
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (__builtin_bit_cast(uint32_t, shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
#endif
}

/// bfloat16 -> binary32, exact.
inline __attribute__((always_inline)) float bfloat16_to_float(uint16_t b) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(b) << 16);
}

/// binary32 -> bfloat16, rounds to nearest even; NaN stays NaN.
inline __attribute__((always_inline)) uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, f);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = bits >> 16 | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

/// The smallest multiple of b that is at least a; a >= 0, b > 0.
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// n choose k, for n up to 16.
constexpr int64_t binomial(int n, int k) {
  if (k < 0 || k > n) return 0;
  int64_t result = 1;
  for (int i = 1; i <= k; ++i) result = result * (n - k + i) / i;
  return result;
}

/// The smallest number of bits that can tell `states` (>= 1) values apart.
constexpr int bits_for(uint64_t states) { return states <= 1 ? 0 : std::bit_width(states - 1); }

}  // namespace stbllm
