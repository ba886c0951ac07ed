#pragma once
// Tokens that are cut out of the text before anything else: control tokens such as "<s>", and tokens added
// later.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

/// An entry of "added_tokens" in tokenizer.json.
struct AddedToken {
  int32_t id = -1;
  std::string content;
  bool single_word = false;  ///< not within a word
  bool lstrip = false;       ///< takes the white space before it
  bool rstrip = false;       ///< takes the white space after it
  bool normalized = false;   ///< looked for in the normalized text
  bool special = false;      ///< left out of decoded text
};

/// Finds tokens in text: at each place the longest one.
class AddedTokenFinder {
 public:
  /// `token` is found wherever `pattern` (its content, or its normalized content) is; an empty pattern is
  /// never found.
  void add(std::string pattern, const AddedToken& token);

  /// A stretch of the text: a token, or what lies between two.
  struct Part {
    size_t begin, end;
    int32_t id;  ///< -1: between tokens
  };
  /// Not empty stretches, in order.
  std::vector<Part> split(std::string_view text) const;

 private:
  struct Entry {
    std::string pattern;
    AddedToken token;
  };
  const Entry* longest_at(std::string_view text, size_t position) const;

  std::vector<Entry> by_first_byte_[256];  // longest pattern first
};

}  // namespace stbllm
