#pragma once
// A scheme: what the weights of one linear may be. Of every M consecutive weights of a row N are kept, and
// the magnitude of a kept weight is one of a few levels times its scale.

#include <compare>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/base/nm_pattern.h"

namespace stbllm {

struct Scheme {
  NmPattern nm{4, 8};
  int levels = 1;  ///< magnitude levels of kept weights, 1 .. 3

  auto operator<=>(const Scheme&) const = default;
  /// "3:8", and with several levels "2:4x3".
  std::string str() const;
  /// Parses what str() writes. Throws Error(kUsage).
  static Scheme parse(std::string_view text);
};

/// How rules and plans write what a linear gets: Scheme::str(), or "keep" for nothing, the weights that it
/// has. parse_code() throws as Scheme::parse() does.
std::string code_text(const std::optional<Scheme>& code);
std::optional<Scheme> parse_code(std::string_view text);

/// "4:8" when all are equal, else how many linears have each: "2:8 x 20, 2:4x3 x 190".
std::string describe(const std::vector<Scheme>& schemes);

}  // namespace stbllm
