#include "stbllm/text/overlap.h"

#include <unordered_set>

#include "stbllm/base/checksum.h"

namespace stbllm {
namespace {

constexpr size_t kMarkedTokens = 32;

std::string mark_at(std::span<const int32_t> ids, size_t first) {
  return checksum(std::as_bytes(ids.subspan(first, kMarkedTokens)));
}

}  // namespace

std::vector<std::string> marks_of(const Windows& windows) {
  std::vector<std::string> marks;
  for (const std::vector<int32_t>& window : windows)
    if (window.size() >= kMarkedTokens) marks.push_back(mark_at(window, (window.size() - kMarkedTokens) / 2));
  return marks;
}

int64_t count_marks(std::span<const int32_t> ids, const std::vector<std::string>& marks) {
  std::unordered_set<std::string> missing(marks.begin(), marks.end());
  const size_t all = missing.size();
  for (size_t first = 0; first + kMarkedTokens <= ids.size() && !missing.empty(); ++first)
    missing.erase(mark_at(ids, first));
  return static_cast<int64_t>(all - missing.size());
}

}  // namespace stbllm
