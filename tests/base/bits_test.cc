#include "stbllm/base/bits.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace stbllm {
namespace {

TEST(Bits, ReadReturnsWhatWriteStoredAtEveryOffsetAndWidth) {
  std::mt19937_64 rng(1);
  for (int width = 0; width <= 57; ++width)
    for (int offset = 0; offset < 16; ++offset) {
      std::array<std::byte, 10> stream;
      stream.fill(std::byte{0xa5});
      const auto before = stream;
      const uint64_t value = rng() & ((uint64_t{1} << width) - 1);
      write_bits(stream.data(), offset, width, value);
      ASSERT_EQ(read_bits(stream.data(), offset, width), value) << width << " bits at " << offset;
      for (int bit = 0; bit < 80; ++bit) {  // the others stay
        if (bit >= offset && bit < offset + width) continue;
        ASSERT_EQ(read_bits(stream.data(), bit, 1), read_bits(before.data(), bit, 1)) << bit;
      }
    }
}

TEST(Bits, BitZeroIsTheLeastSignificantOfTheFirstByte) {
  const std::array stream = {std::byte{0x81}, std::byte{0x02}};
  EXPECT_EQ(read_bits(stream.data(), 0, 1), 1u);
  EXPECT_EQ(read_bits(stream.data(), 1, 6), 0u);
  EXPECT_EQ(read_bits(stream.data(), 7, 3), 0b101u);
}

TEST(Bits, WideWriteIgnoresBitsAboveTheWidth) {
  std::array<std::byte, 2> stream{};
  write_bits(stream.data(), 2, 3, ~uint64_t{0});
  EXPECT_EQ(read_bits(stream.data(), 0, 16), 0b11100u);
}

// The value of an IEEE binary16 number by its definition.
double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  double magnitude = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) magnitude = fraction ? std::numeric_limits<double>::quiet_NaN() : INFINITY;
  return h & 0x8000 ? -magnitude : magnitude;
}

TEST(Half, EveryValueConvertsExactlyAndBack) {
  for (int h = 0; h <= 0xffff; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const float value = half_to_float(half);
    if (std::isnan(half_value(half))) {
      ASSERT_TRUE(std::isnan(value)) << h;
      ASSERT_TRUE(std::isnan(half_to_float(float_to_half(value)))) << h;
      continue;
    }
    ASSERT_EQ(value, half_value(half)) << h;
    ASSERT_EQ(float_to_half(value), half) << h;  // the sign of zero too
  }
}

TEST(Half, RoundsToTheNearestAndTiesToEven) {
  for (int h = 0; h < 0x7bff; ++h) {  // between each two finite neighbours
    const float low = half_to_float(static_cast<uint16_t>(h)),
                high = half_to_float(static_cast<uint16_t>(h + 1));
    const float middle = low + (high - low) / 2;  // exact in float32
    const int even = h & 1 ? h + 1 : h;
    ASSERT_EQ(float_to_half(middle), even) << h;
    ASSERT_EQ(float_to_half(std::nextafter(middle, 0.0f)), h) << h;
    ASSERT_EQ(float_to_half(std::nextafter(middle, INFINITY)), h + 1) << h;
    ASSERT_EQ(float_to_half(-middle), even | 0x8000) << h;
  }
}

TEST(Half, OverflowsToInfinity) {
  EXPECT_EQ(float_to_half(65519.0f), 0x7bff);
  EXPECT_EQ(float_to_half(65520.0f), 0x7c00);
  EXPECT_EQ(float_to_half(-1e30f), 0xfc00);
  EXPECT_EQ(float_to_half(INFINITY), 0x7c00);
  EXPECT_EQ(float_to_half(1e-30f), 0);
}

TEST(Binomial, FollowsPascalsTriangle) {
  for (int n = 1; n <= 16; ++n)
    for (int k = 1; k < n; ++k) EXPECT_EQ(binomial(n, k), binomial(n - 1, k - 1) + binomial(n - 1, k));
  EXPECT_EQ(binomial(16, 8), 12870);
  EXPECT_EQ(binomial(4, 0), 1);
  EXPECT_EQ(binomial(4, 4), 1);
  EXPECT_EQ(binomial(3, 5), 0);
  EXPECT_EQ(binomial(3, -1), 0);
}

TEST(BitsFor, IsTheSmallestSufficientWidth) {
  EXPECT_EQ(bits_for(1), 0);
  EXPECT_EQ(bits_for(2), 1);
  EXPECT_EQ(bits_for(3), 2);
  EXPECT_EQ(bits_for(256), 8);
  EXPECT_EQ(bits_for(257), 9);
}

}  // namespace
}  // namespace stbllm
