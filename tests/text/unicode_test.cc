#include "stbllm/text/unicode.h"

#include <gtest/gtest.h>

#include <vector>

namespace stbllm {
namespace {

using namespace std::string_literals;

TEST(Utf8, RoundTripsTheBoundariesOfEveryLength) {
  for (const char32_t code :
       {0u, 0x7fu, 0x80u, 0x7ffu, 0x800u, 0xd7ffu, 0xe000u, 0xffffu, 0x10000u, 0x10ffffu}) {
    std::string text;
    append_utf8(text, code);
    const CodePoint point = decode_utf8(text, 0);
    EXPECT_TRUE(point.valid);
    EXPECT_EQ(point.value, code);
    EXPECT_EQ(point.length, static_cast<int>(text.size()));
  }
}

TEST(Utf8, FindsWhatIsNotUtf8) {
  EXPECT_EQ(find_invalid_utf8("plain \u00e9 \u65e5 \U0001f600"), std::string_view::npos);
  const std::string bad[] = {"\x80"s,              // continuation without a lead
                             "\xc0\x80"s,          // overlong NUL
                             "\xe0\x9f\xbf"s,      // overlong U+07FF
                             "\xf0\x8f\xbf\xbf"s,  // overlong U+FFFF
                             "\xed\xa0\x80"s,      // surrogate
                             "\xf4\x90\x80\x80"s,  // above U+10FFFF
                             "\xff"s,
                             "\xe6\x97"s};  // truncated
  for (const std::string& bytes : bad)
    EXPECT_EQ(find_invalid_utf8("ab" + bytes), 2u) << testing::PrintToString(bytes);
}

TEST(Utf8, ReplacesEachInvalidPartOnce) {
  // Unicode, section 3.9, "U+FFFD Substitution of Maximal Subparts", table 3-8 and 3-11.
  EXPECT_EQ(replace_invalid_utf8("\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD"
            "A");
  EXPECT_EQ(replace_invalid_utf8("\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41"),
            "\uFFFD\uFFFD\uFFFD\uFFFD"
            "A");
  EXPECT_EQ(replace_invalid_utf8("\u65e5\xe6\x97"), "\u65e5\uFFFD");
}

TEST(CharClass, TellsLettersNumbersSpacesAndWordsApart) {
  for (const char32_t c : {U'a', U'\u00e9', U'\u4e00', U'\U000323af'})
    EXPECT_EQ(char_class(c), CharClass::kLetter);
  for (const char32_t c : {U'7', U'\u0663', U'\u2167'}) EXPECT_EQ(char_class(c), CharClass::kNumber);
  for (const char32_t c : {U'\u00b2', U'\u00bd'}) EXPECT_EQ(char_class(c), CharClass::kOtherNumber);
  for (const char32_t c : {U' ', U'\n', U'\u0085', U'\u00a0', U'\u3000'})
    EXPECT_EQ(char_class(c), CharClass::kSpace);
  for (const char32_t c : {U'_', U'\u0301', U'\u200d', U'\u24b6'}) EXPECT_EQ(char_class(c), CharClass::kWord);
  for (const char32_t c : {U'!', U'\u200b', U'\u2581', U'\U0001f600', U'\U0010ffff'}) {
    EXPECT_EQ(char_class(c), CharClass::kOther);
  }
  EXPECT_TRUE(is_number(CharClass::kOtherNumber));
  EXPECT_FALSE(is_word(CharClass::kOtherNumber));
}

TEST(Nfc, ComposesOrdersAndKeeps) {
  const std::pair<std::string, std::string> cases[] = {
      {"ascii", "ascii"},
      {"e\u0301", "\u00e9"},
      {"\u212b", "\u00c5"},  // one character for another
      {"a\u0323\u0307", "\u1ea1\u0307"},
      {"a\u0307\u0323", "\u1ea1\u0307"},  // the same marks in the other order
      {"\u1e9b\u0323", "\u1e9b\u0323"},   // from the Unicode normalization examples
      {"\u0958", "\u0915\u093c"},         // excluded from composition
      {"a\u0301\u0301", "\u00e1\u0301"},  // the second mark is blocked by nothing but has no composition
      {"a\u0315\u0300", "\u00e0\u0315"},  // reordered first, then composed across the other class
      {"a\u0489e\u0301", "a\u0489\u00e9"},
      {"\u1100\u1161", "\uac00"},  // Hangul by arithmetic
      {"\u1100\u1161\u11a8", "\uac01"},
      {"\uac00\u11a8", "\uac01"},
      {"\uac01\u11a8", "\uac01\u11a8"},
      {"\u0301", "\u0301"},  // no starter
      {"\U0001d15e", "\U0001d157\U0001d165"},
  };
  for (const auto& [text, composed] : cases)
    EXPECT_EQ(normalize_nfc(text), composed) << testing::PrintToString(text);
}

}  // namespace
}  // namespace stbllm
