#pragma once
// Tokens that are cut out of the text before anything else: control tokens such as "<s>", and tokens added
// later.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "stbllm/text/byte_pair_encoder.h"

namespace stbllm {

/// An entry of "added_tokens" in tokenizer.json.
struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool single_word = false;  ///< it is not found within a word
  bool lstrip = false;       ///< it takes the white space before it
  bool rstrip = false;       ///< it takes the white space after it
  bool normalized = false;   ///< it is looked for in the normalized text
  bool special = false;      ///< it is left out of decoded text
};

/// Finds tokens in a text; where several begin at one place, the longest one is found.
class AddedTokenFinder {
 public:
  /// From now on `token` is found wherever `pattern` (its content, or its normalized content) stands. An
  /// empty pattern is never found. Throws Error(kUnsupported) when it is longer than 256 bytes, which would
  /// make the search slow.
  void add(std::string pattern, const AddedToken& token);

  /// A stretch of the text: a token, or what lies between two tokens.
  struct Part {
    size_t begin, end;
    int32_t id;  ///< -1: between tokens
  };
  /// The stretches of `text` in order; none of them is empty.
  std::vector<Part> split(std::string_view text) const;

 private:
  using Entries = std::unordered_map<std::string, AddedToken, StringHash, std::equal_to<>>;
  const Entries::value_type* longest_at(std::string_view text, size_t position) const;

  Entries entries_;                                // by pattern
  std::set<size_t, std::greater<>> lengths_[256];  // of the patterns, by their first byte
};

}  // namespace stbllm
