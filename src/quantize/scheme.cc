#include "stbllm/quantize/scheme.h"

#include <fmt/format.h>

#include <map>

#include "stbllm/base/error.h"

namespace stbllm {

std::string Scheme::str() const { return levels == 1 ? nm.str() : fmt::format("{}x{}", nm.str(), levels); }

Scheme Scheme::parse(std::string_view text) {
  const size_t times = text.find('x');
  if (times == std::string_view::npos) return {.nm = NmPattern::parse(text), .levels = 1};
  const std::string_view levels = text.substr(times + 1);
  if (levels != "1" && levels != "2" && levels != "3")
    fail(ErrorCode::kUsage, "code '{}': expected N:M, or N:Mx2 and N:Mx3 for two and three levels", text);
  return {.nm = NmPattern::parse(text.substr(0, times)), .levels = levels[0] - '0'};
}

namespace {
constexpr std::string_view kKeep = "keep";
}

std::string code_text(const std::optional<Scheme>& code) { return code ? code->str() : std::string(kKeep); }

std::optional<Scheme> parse_code(std::string_view text) {
  if (text == kKeep) return std::nullopt;
  return Scheme::parse(text);
}

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
