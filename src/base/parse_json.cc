#include "stbllm/base/parse_json.h"

#include <nlohmann/json.hpp>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

constexpr int kMostNested = 64;

/// Whether more arrays and objects than kMostNested are open somewhere in `text`.
bool nested_too_deeply(std::string_view text) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      quoted = c != '"';
    } else if (c == '"') {
      quoted = true;
    } else if (c == '[' || c == '{') {
      if (++depth > kMostNested) return true;
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace

nlohmann::json parse_json(std::string_view text) {
  if (nested_too_deeply(text))
    fail(ErrorCode::kCorrupt, "expected JSON of at most {} nested arrays and objects, found more",
         kMostNested);
  return nlohmann::json::parse(text);
}

nlohmann::json try_parse_json(std::string_view text) {
  return nlohmann::json::parse(nested_too_deeply(text) ? std::string_view() : text, nullptr,
                               /*allow_exceptions=*/false);
}

}  // namespace stbllm
