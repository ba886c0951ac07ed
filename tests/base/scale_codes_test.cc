#include "stbllm/base/scale_codes.h"

#include <gtest/gtest.h>

#include <cmath>

namespace stbllm {
namespace {

TEST(ScaleCodes, FactorsHalveEveryFourthOfTheRange) {
  for (int bits = 4; bits <= 6; ++bits) {
    const int codes = 1 << bits;
    const std::array<float, 64>& factors = scale_code_factors(bits);
    EXPECT_EQ(factors[0], 1.0f);
    for (int code = 0; code < codes; ++code) {
      const long double exact = std::exp2(-static_cast<long double>(code) / (codes / 4));
      EXPECT_EQ(factors[code], static_cast<float>(exact)) << bits << " " << code;
      if (code >= codes / 4) {
        EXPECT_EQ(factors[code], factors[code - codes / 4] / 2);
      }
    }
  }
}

}  // namespace
}  // namespace stbllm
