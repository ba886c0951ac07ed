#pragma once
// Logarithmic scale codes: code c of b bits stands for the factor 2^-(c 2^(2 - b)), which covers four octaves
// whatever b is. FORMAT.md is the specification.

#include <array>
#include <cmath>

#include "stbllm/base/error.h"

namespace stbllm {

/// The factors of all codes of `scale_bits` (4..6) bits, rounded to float32.
inline const std::array<float, 64>& scale_code_factors(int scale_bits) {
  STBLLM_CHECK(scale_bits >= 4 && scale_bits <= 6, "scale codes of {} bits", scale_bits);
  static const auto all = [] {
    std::array<std::array<float, 64>, 3> factors{};
    for (int bits = 4; bits <= 6; ++bits)
      for (int code = 0; code < 1 << bits; ++code)
        factors[bits - 4][code] =
            static_cast<float>(std::exp2(-std::ldexp(static_cast<double>(code), 2 - bits)));
    return factors;
  }();
  return all[scale_bits - 4];
}

}  // namespace stbllm
