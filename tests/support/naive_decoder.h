#pragma once
// A second decoder of packed linears, written from src/pack/FORMAT.md alone and as plainly as possible: bits
// are read one at a time, supports are found by listing all of them. Nothing here may include stbllm/pack or
// stbllm/base.

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace stbllm::test {

class NaiveDecoder {
 public:
  /// The JSON fields of a linear.
  struct Fields {
    int64_t rows, cols;
    int keep, group, levels, column_block, scale_bits;
    int64_t salient, outliers;
  };

  /// `planes` by tensor name suffix ("codes", "scales", ...).
  NaiveDecoder(const Fields& fields, std::map<std::string, std::span<const std::byte>> planes)
      : f_(fields), planes_(std::move(planes)), supports_(list_supports(f_.keep, f_.group)) {
    uint64_t states = supports_.size();
    for (int k = 0; k < f_.keep; ++k) states *= static_cast<uint64_t>(2 * f_.levels);
    while (states > uint64_t{1} << code_bits_) ++code_bits_;
  }

  int code_bits() const { return code_bits_; }

  float weight(int64_t row, int64_t col) const {
    for (int64_t i = 0; i < f_.outliers; ++i)
      if (column("outlier_columns", i) == col) return half("outlier_values", i * f_.rows + row);

    const int64_t groups = (f_.cols + f_.group - 1) / f_.group;
    const int64_t row_bytes = (groups * code_bits_ + 7) / 8;
    uint64_t rest = bits("codes", row * row_bytes * 8 + col / f_.group * code_bits_, code_bits_);
    std::vector<int> sign, level;
    for (int k = 0; k < f_.keep; ++k, rest /= 2) sign.push_back(static_cast<int>(rest % 2));
    for (int k = 0; k < f_.keep; ++k, rest /= static_cast<uint64_t>(f_.levels))
      level.push_back(static_cast<int>(rest % static_cast<uint64_t>(f_.levels)));
    const std::vector<int>& support = supports_.at(rest);

    for (int k = 0; k < f_.keep; ++k) {
      if (support[k] != col % f_.group) continue;
      const int64_t block = col / f_.column_block;
      for (int64_t i = 0; i < f_.salient; ++i) {
        if (column("salient_columns", i) != col) continue;
        const bool residual_sign = bits("salient_signs", i * ((f_.rows + 7) / 8) * 8 + row, 1) != 0;
        const float first = scale(row, block, f_.levels), second = scale(row, block, f_.levels + 1);
        return (sign[k] ? -first : first) + (residual_sign ? -second : second);
      }
      return sign[k] ? -scale(row, block, level[k]) : scale(row, block, level[k]);
    }
    return 0.0f;
  }

 private:
  // All choices of `keep` out of `group` positions, by the value of their bit masks (bit p set: position p
  // kept), which is the colexicographic order.
  static std::vector<std::vector<int>> list_supports(int keep, int group) {
    std::vector<std::vector<int>> supports;
    for (unsigned mask = 0; mask < 1u << group; ++mask) {
      if (std::popcount(mask) != keep) continue;
      std::vector<int>& positions = supports.emplace_back();
      for (int p = 0; p < group; ++p)
        if (mask >> p & 1) positions.push_back(p);
    }
    return supports;
  }

  uint64_t bits(const std::string& plane, int64_t first, int count) const {
    uint64_t value = 0;
    for (int i = 0; i < count; ++i) {
      const auto byte = static_cast<unsigned>(planes_.at(plane)[static_cast<size_t>((first + i) / 8)]);
      value += static_cast<uint64_t>(byte >> ((first + i) % 8) & 1) << i;
    }
    return value;
  }

  float half(const std::string& plane, int64_t index) const {
    const auto value = static_cast<int>(bits(plane, 16 * index, 16));
    const int sign = value / 32768, exponent = value / 1024 % 32, fraction = value % 1024;
    const double magnitude =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    return static_cast<float>(sign ? -magnitude : magnitude);
  }

  int64_t column(const std::string& plane, int64_t index) const {
    return static_cast<int64_t>(bits(plane, 32 * index, 32));
  }

  float scale(int64_t row, int64_t block, int slot) const {
    const int64_t blocks = (f_.cols + f_.column_block - 1) / f_.column_block;
    const int slots = f_.levels + (f_.salient > 0 ? 2 : 0);
    if (f_.scale_bits == 16) return half("scales", (row * blocks + block) * slots + slot);
    const int64_t row_bytes = (blocks * f_.scale_bits + 7) / 8;
    const uint64_t code = bits("scale_codes", row * row_bytes * 8 + block * f_.scale_bits, f_.scale_bits);
    const auto factor =
        static_cast<float>(std::pow(2.0, -static_cast<double>(code) * std::pow(2.0, 2 - f_.scale_bits)));
    const float base = half("row_scales", row) * factor;
    return base * half("levels", slot);
  }

  Fields f_;
  std::map<std::string, std::span<const std::byte>> planes_;
  std::vector<std::vector<int>> supports_;
  int code_bits_ = 0;
};

}  // namespace stbllm::test
