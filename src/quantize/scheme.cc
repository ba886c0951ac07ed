#include "stbllm/quantize/scheme.h"

#include <fmt/format.h>

#include <map>

namespace stbllm {

std::string Scheme::str() const { return levels == 1 ? nm.str() : fmt::format("{}x{}", nm.str(), levels); }

std::string describe(const std::vector<Scheme>& schemes) {
  std::map<Scheme, int> counts;
  for (const Scheme& scheme : schemes) ++counts[scheme];
  if (counts.size() == 1) return counts.begin()->first.str();
  std::string text;
  for (const auto& [scheme, count] : counts)
    text += fmt::format("{}{} x {}", text.empty() ? "" : ", ", scheme.str(), count);
  return text;
}

}  // namespace stbllm
