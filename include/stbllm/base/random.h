#pragma once
// SplitMix64 (Steele, Lea, Flood 2014): the state advances by the golden ratio times 2^64, and each output is
// a bijective mix of the state. The standard library's distributions differ from one library to the next, but
// windows and samples must be the same on every machine.

#include <cstdint>

namespace stbllm {

class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// Uniform in [0, end). Outputs below 2^64 mod end are drawn again, so that every value comes from equally
  /// many outputs.
  uint64_t below(uint64_t end) {
    const uint64_t excess = (0 - end) % end;
    uint64_t value;
    do value = next();
    while (value < excess);
    return value % end;
  }
  /// A multiple of 2^-53, uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  uint64_t state_;
};

}  // namespace stbllm
