#pragma once
// What tokenizers need of Unicode 16.0: UTF-8, the character classes of their regular expressions, and NFC.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace stbllm {

/// One step of decoding UTF-8.
struct CodePoint {
  char32_t value;  ///< U+FFFD when the bytes are no valid sequence
  int length;      ///< bytes of the sequence, or of the invalid part that one U+FFFD replaces
  bool valid;
};

/// The code point that starts at byte `position` (< text.size()).
CodePoint decode_utf8(std::string_view text, size_t position);
/// Appends the code point `code`.
void append_utf8(std::string& text, char32_t code);
/// Position of the first byte that is not part of a valid sequence; std::string_view::npos when all are.
size_t find_invalid_utf8(std::string_view text);
/// `bytes` with every invalid part replaced by U+FFFD.
std::string replace_invalid_utf8(std::string_view bytes);

/// The classes that the regular expressions of tokenizers tell apart: \p{L}, \p{N} (two parts), \s, and the
/// rest of \w.
enum class CharClass : uint8_t {
  kOther,
  kLetter,       ///< L*
  kNumber,       ///< Nd, Nl
  kOtherNumber,  ///< No: a number, but no part of a word
  kSpace,        ///< White_Space
  kWord,         ///< marks, connectors and whatever else \w matches
};

CharClass char_class(char32_t code);
inline bool is_number(CharClass c) { return c == CharClass::kNumber || c == CharClass::kOtherNumber; }
/// \w of a regular expression.
inline bool is_word(CharClass c) {
  return c == CharClass::kLetter || c == CharClass::kNumber || c == CharClass::kWord;
}

/// Normalization Form C of valid UTF-8.
std::string normalize_nfc(std::string_view text);

}  // namespace stbllm
