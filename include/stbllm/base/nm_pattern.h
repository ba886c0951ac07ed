#pragma once
// N:M sparsity: of every M consecutive columns of a row, N weights are kept. The first number is always that
// of the kept ones, never that of the pruned ones.

#include <compare>
#include <string>
#include <string_view>

namespace stbllm {

struct NmPattern {
  int keep = 4;   ///< N, 1..group
  int group = 8;  ///< M: 4, 8 or 16

  auto operator<=>(const NmPattern&) const = default;
  double density() const { return static_cast<double>(keep) / group; }
  std::string str() const { return std::to_string(keep) + ":" + std::to_string(group); }

  /// Parses "4:8". Throws Error(kUsage) unless 1 <= N <= M and M is 4, 8 or 16.
  static NmPattern parse(std::string_view text);
};

}  // namespace stbllm
