#include "stbllm/base/lanes.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>

namespace stbllm {
namespace {

using Numbers = std::array<float, kLanes>;

Numbers random_numbers(int seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  Numbers numbers;
  for (float& number : numbers) number = normal(rng);
  return numbers;
}

template <typename Lanes>
Numbers numbers_of(const Lanes& x) {
  Numbers numbers;
  store_lanes(numbers.data(), x);
  return numbers;
}

/// The same sixteen numbers in one, two and four registers.
template <typename T>
class LanesTest : public testing::Test {};
using Widths = testing::Types<LanesIn<1>, LanesIn<2>, LanesIn<4>>;
TYPED_TEST_SUITE(LanesTest, Widths);

TYPED_TEST(LanesTest, ArithmeticIsThatOfEachNumber) {
  using Lanes = TypeParam;
  const Numbers a = random_numbers(1), b = random_numbers(2);
  const Lanes x = load_lanes<Lanes>(a.data()), y = load_lanes<Lanes>(b.data());
  const Numbers sum = numbers_of(x + y), quotient = numbers_of(2.f / x), negative = numbers_of(-x),
                larger = numbers_of(select(x > y, x, y)), bounded = numbers_of(select(x < 0.5f, x, y - y)),
                magnitude = numbers_of(magnitude_of(x)), root = numbers_of(sqrt_of(magnitude_of(x))),
                whole = numbers_of(converted<float>(converted<int32_t>(x * 100.f))),
                signs = numbers_of(with_signs_of(magnitude_of(y), x)),
                zeroed = numbers_of(masked<Lanes>(x, x > y));
  for (size_t i = 0; i < kLanes; ++i) {
    EXPECT_EQ(sum[i], a[i] + b[i]);
    EXPECT_EQ(quotient[i], 2 / a[i]);
    EXPECT_EQ(negative[i], -a[i]);
    EXPECT_EQ(larger[i], std::max(a[i], b[i]));
    EXPECT_EQ(bounded[i], a[i] < 0.5f ? a[i] : 0.f);
    EXPECT_EQ(magnitude[i], std::fabs(a[i]));
    EXPECT_EQ(root[i], std::sqrt(std::fabs(a[i])));
    EXPECT_EQ(whole[i], std::trunc(a[i] * 100));
    EXPECT_EQ(signs[i], std::copysign(b[i], a[i]));
    EXPECT_EQ(zeroed[i], a[i] > b[i] ? a[i] : 0.f);
  }
  EXPECT_EQ(largest_of(x), *std::ranges::max_element(a));
}

TYPED_TEST(LanesTest, ASumIsATreeWhateverTheRegisters) {
  using Lanes = TypeParam;
  const Numbers a = random_numbers(3);
  Numbers tree = a;
  for (size_t half = kLanes / 2; half > 0; half /= 2)
    for (size_t i = 0; i < half; ++i) tree[i] += tree[i + half];
  EXPECT_EQ(sum_of(load_lanes<Lanes>(a.data())), tree[0]);
}

TYPED_TEST(LanesTest, MemoryIsTouchedForTheFirstNumbersOnly) {
  using Lanes = TypeParam;
  const Numbers a = random_numbers(4);
  for (int count = 0; count <= kLanes; ++count) {
    const Numbers loaded = numbers_of(load_lanes<Lanes>(a.data(), count));
    Numbers stored;
    stored.fill(7);
    store_lanes(stored.data(), load_lanes<Lanes>(a.data()), count);
    for (int i = 0; i < kLanes; ++i) {
      EXPECT_EQ(loaded[static_cast<size_t>(i)], i < count ? a[static_cast<size_t>(i)] : 0.f);
      EXPECT_EQ(stored[static_cast<size_t>(i)], i < count ? a[static_cast<size_t>(i)] : 7.f);
    }
  }
}

TYPED_TEST(LanesTest, ShufflesTakeEachNumberFromItsPlace) {
  using Lanes = TypeParam;
  constexpr LaneIndex kReversed = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0},
                      kMixed = {3, 9, 0, 12, 7, 7, 15, 1, 8, 2, 14, 5, 11, 0, 6, 10};
  const Numbers a = random_numbers(5);
  const Lanes x = load_lanes<Lanes>(a.data());
  const Numbers reversed = numbers_of(shuffle<kReversed>(x)), mixed = numbers_of(shuffle<kMixed>(x));
  for (size_t i = 0; i < kLanes; ++i) {
    EXPECT_EQ(reversed[i], a[kLanes - 1 - i]);
    EXPECT_EQ(mixed[i], a[static_cast<size_t>(kMixed[i])]);
  }
}

TYPED_TEST(LanesTest, NarrowNumbersAreReadAndWritten) {
  using Lanes = TypeParam;
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  // Ties to even: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3 * 2^-8 between that and 1 + 2^-6.
  const Numbers a = {1.f,  1 + 0x1p-8f, 1 + 0x3p-8f, -3.f, inf, -inf, nan, 0.f,
                     -0.f, 1e-40f,      2,           3,    4,   5,    6,   7};
  std::array<uint16_t, kLanes> words;
  store_bfloat16_lanes(words.data(), round_to_bfloat16(load_lanes<Lanes>(a.data())));
  EXPECT_EQ(words[1], 0x3f80);
  EXPECT_EQ(words[2], 0x3f82);
  const Numbers back = numbers_of(load_bfloat16_lanes<Lanes>(words.data()));
  EXPECT_TRUE(std::isnan(back[6]));
  EXPECT_EQ(back[3], -3.f);
  EXPECT_EQ(back[4], inf);
  EXPECT_TRUE(std::signbit(back[8]));

  std::array<int8_t, kLanes> bytes, bytes_back;
  std::array<int16_t, kLanes> shorts, shorts_back;
  for (size_t i = 0; i < kLanes; ++i) {
    bytes[i] = static_cast<int8_t>(17 * static_cast<int>(i) - 128);
    shorts[i] = static_cast<int16_t>(4369 * static_cast<int>(i) - 32768);
  }
  store_byte_lanes(bytes_back.data(), load_byte_lanes<Lanes>(bytes.data()));
  store_short_lanes(shorts_back.data(), load_short_lanes<Lanes>(shorts.data()));
  EXPECT_EQ(bytes_back, bytes);
  EXPECT_EQ(shorts_back, shorts);
}

TYPED_TEST(LanesTest, ExponentialsAreCloseOverTheWholeRange) {
  using Lanes = TypeParam;
  for (float first = -90; first < 90; first += 0.37f) {
    Numbers a;
    for (size_t i = 0; i < kLanes; ++i) a[i] = first + 0.01f * static_cast<float>(i);
    const Numbers e = numbers_of(exp_of(load_lanes<Lanes>(a.data())));
    for (size_t i = 0; i < kLanes; ++i) {
      const double exact = std::exp(static_cast<double>(a[i]));
      if (a[i] < -87)
        EXPECT_EQ(e[i], 0);
      else if (a[i] > 88.3f)
        EXPECT_EQ(e[i], std::numeric_limits<float>::infinity());
      else
        EXPECT_NEAR(e[i] / exact, 1, 3 * 0x1p-23) << a[i];  // three units in the last place
    }
  }
}

TEST(WithLanes, RunsTheBodyOnceAndReturnsWhatItReturns) {
  const Numbers a = random_numbers(6);
  int calls = 0;
  const float sum = with_lanes([&]<typename Lanes>() STBLLM_INLINED {
    ++calls;
    return sum_of(load_lanes<Lanes>(a.data()));
  });
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(sum, sum_of(load_lanes<LanesIn<4>>(a.data())));
}

}  // namespace
}  // namespace stbllm
