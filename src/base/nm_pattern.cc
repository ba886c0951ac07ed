#include "stbllm/base/nm_pattern.h"

#include <charconv>

#include "stbllm/base/error.h"

namespace stbllm {

NmPattern NmPattern::parse(std::string_view text) {
  NmPattern nm;
  const char* end = text.data() + text.size();
  const auto [colon, keep_error] = std::from_chars(text.data(), end, nm.keep);
  bool ok = keep_error == std::errc() && colon != end && *colon == ':';
  if (ok) {
    const auto [rest, group_error] = std::from_chars(colon + 1, end, nm.group);
    ok = group_error == std::errc() && rest == end;
  }
  ok = ok && (nm.group == 4 || nm.group == 8 || nm.group == 16) && nm.keep >= 1 && nm.keep <= nm.group;
  if (!ok)
    fail(ErrorCode::kUsage,
         "N:M pattern '{}': expected kept:group such as 4:8, with 1 <= N <= M and M one of 4, 8, 16", text);
  return nm;
}

}  // namespace stbllm
