#include "stbllm/text/added_tokens.h"

#include <algorithm>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

/// Where the code point that ends at `end` (> 0) starts.
size_t previous_code_point(std::string_view text, size_t end) {
  do --end;
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xc0) == 0x80);
  return end;
}

CharClass class_before(std::string_view text, size_t end) {
  return char_class(decode_utf8(text, previous_code_point(text, end)).value);
}

CharClass class_at(std::string_view text, size_t begin) { return char_class(decode_utf8(text, begin).value); }

bool within_word(std::string_view text, size_t begin, size_t end) {
  return (begin > 0 && is_word(class_before(text, begin))) ||
         (end < text.size() && is_word(class_at(text, end)));
}

}  // namespace

void AddedTokenFinder::add(std::string pattern, const AddedToken& token) {
  constexpr size_t kLongest = 256;
  if (pattern.empty()) return;
  if (pattern.size() > kLongest)
    fail(ErrorCode::kUnsupported, "added token {} has {} bytes, at most {} are possible", token.id,
         pattern.size(), kLongest);
  lengths_[static_cast<uint8_t>(pattern.front())].insert(pattern.size());
  entries_.emplace(std::move(pattern), token);
}

const AddedTokenFinder::Entries::value_type* AddedTokenFinder::longest_at(std::string_view text,
                                                                          size_t position) const {
  for (const size_t length : lengths_[static_cast<uint8_t>(text[position])]) {
    if (length > text.size() - position) continue;
    if (const auto found = entries_.find(text.substr(position, length)); found != entries_.end())
      return &*found;
  }
  return nullptr;
}

std::vector<AddedTokenFinder::Part> AddedTokenFinder::split(std::string_view text) const {
  std::vector<Part> parts;
  size_t done = 0;  // everything before is in `parts`
  for (size_t i = 0; i < text.size();) {
    const auto* entry = longest_at(text, i);
    if (entry == nullptr) {
      ++i;
      continue;
    }
    const auto& [pattern, token] = *entry;
    size_t begin = i, end = i + pattern.size();
    // The search goes on behind a match even when the match is dropped: no shorter token is tried in its
    // place. It does not skip the spaces that rstrip takes: as in HuggingFace, a token made of spaces is
    // found there.
    i = end;
    if (token.single_word && within_word(text, begin, end)) continue;
    if (token.lstrip) {
      while (begin > done && class_before(text, begin) == CharClass::kSpace)
        begin = previous_code_point(text, begin);
    }
    if (token.rstrip) {
      end = std::max(end, done);  // the spaces up to there are known
      while (end < text.size() && class_at(text, end) == CharClass::kSpace)
        end += decode_utf8(text, end).length;
    }
    if (done < begin) parts.push_back({done, begin, -1});
    parts.push_back({begin, end, token.id});
    done = end;
  }
  if (done < text.size()) parts.push_back({done, text.size(), -1});
  return parts;
}

}  // namespace stbllm
