// The words expected here are those of HuggingFace tokenizers 0.23.3 (pre_tokenize_str).

#include "stbllm/text/pre_tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "support/expect_error.h"
#include "text/small_tokenizers.h"

namespace stbllm {
namespace {

using nlohmann::json;
using test::kGpt2Pattern;
using test::kLlama3Pattern;
using test::kQwen2Pattern;
using test::split_by;

using Words = std::vector<std::string>;
struct Case {
  std::string text;
  Words words;
};

void expect_words(const json& spec, const std::vector<Case>& cases) {
  const PreTokenizer pre_tokenize = parse_pre_tokenizer(spec);
  for (const Case& c : cases) {
    Words words = {c.text};
    pre_tokenize(words, /*at_start=*/true);
    EXPECT_EQ(words, c.words) << testing::PrintToString(c.text);
  }
}

TEST(PreTokenizer, SplitsAsGpt2) {
  expect_words(split_by(kGpt2Pattern),
               {
                   {"Hello world", {"Hello", " world"}},
                   {"I'll don't we've I'M 'tis",
                    {"I", "'ll", " don", "'t", " we", "'ve", " I", "'", "M", " '", "tis"}},
                   {"it''s", {"it", "''", "s"}},
                   {"a1b 22 33,44", {"a", "1", "b", " 22", " 33", ",", "44"}},
                   {"  two   spaces ", {" ", " two", "  ", " spaces", " "}},
                   {"tab\t\tx\n\ny", {"tab", "\t", "\t", "x", "\n", "\n", "y"}},
                   {" \n", {" \n"}},
                   {"!?. (x)", {"!?.", " (", "x", ")"}},
                   {"na\u00efve \u65e5\u672c\u8a9e \u0663\u00bd",
                    {"na\u00efve", " \u65e5\u672c\u8a9e", " \u0663\u00bd"}},
                   {"a\u0301b \u200b\u3000c", {"a", "\u0301", "b", " \u200b", "\u3000", "c"}},
               });
}

TEST(PreTokenizer, SplitsAsLlama3) {
  expect_words(split_by(kLlama3Pattern), {
                                             {"Hello world", {"Hello", " world"}},
                                             {"I'LL DON'T we've x'\u017ft",
                                              {"I", "'LL", " DON", "'T", " we", "'ve", " x", "'\u017f", "t"}},
                                             {"12345678 9", {"123", "456", "78", " ", "9"}},
                                             {"x\t\ty \n\n z", {"x", "\t", "\ty", " \n\n", " z"}},
                                             {"...\n\n\nfoo !\r\n", {"...\n\n\n", "foo", " !\r\n"}},
                                             {" (x) \u00e9t\u00e9", {" (", "x", ")", " \u00e9t\u00e9"}},
                                             {"  a\n  \n b   ", {" ", " a", "\n  \n", " b", "   "}},
                                             {"\u00a0word \u3000\n", {"\u00a0word", " \u3000\n"}},
                                             {"$x 'sad", {"$x", " '", "sad"}},
                                             {"\u0663\u00bd\u2167\u4e00", {"\u0663\u00bd\u2167", "\u4e00"}},
                                         });
}

TEST(PreTokenizer, SplitsAsQwen2OneDigitAtATime) {
  const std::vector<Case> cases = {
      {"12345 x1", {"1", "2", "3", "4", "5", " x", "1"}}, {"I'M", {"I", "'M"}}, {"a\n\n", {"a", "\n\n"}}};
  expect_words(split_by(kQwen2Pattern), cases);
  json removed_between = split_by(kQwen2Pattern);
  removed_between["behavior"] = "Removed";
  removed_between["invert"] = true;
  expect_words(removed_between, cases);
}

TEST(PreTokenizer, SplitsDigits) {
  expect_words(
      {{"type", "Digits"}, {"individual_digits", true}},
      {{"a12b \u0663\u00bd", {"a", "1", "2", "b ", "\u0663", "\u00bd"}}, {"2019", {"2", "0", "1", "9"}}});
  expect_words({{"type", "Digits"}, {"individual_digits", false}},
               {{"a12b \u0663\u00bd 3", {"a", "12", "b ", "\u0663\u00bd", " ", "3"}}, {"2019", {"2019"}}});
}

TEST(PreTokenizer, MapsBytesToSymbolsAfterDigitsAsSmolLm) {
  expect_words({{"type", "Sequence"},
                {"pretokenizers",
                 {{{"type", "Digits"}, {"individual_digits", true}},
                  {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}}}},
               {{"in 2019 x", {"in", "\u0120", "2", "0", "1", "9", "\u0120x"}},
                {"\u00e9 1's", {"\u00c3\u00a9", "\u0120", "1", "'s"}}});
}

TEST(PreTokenizer, PutsASpaceBeforeTheFirstWord) {
  expect_words({{"type", "ByteLevel"}, {"add_prefix_space", true}}, {{"a b",
                                                                      {"\u0120"
                                                                       "a",
                                                                       "\u0120"
                                                                       "b"}},
                                                                     {" a",
                                                                      {"\u0120"
                                                                       "a"}},
                                                                     {"\n", {"\u0120\u010a"}}});
}

TEST(PreTokenizer, MarksSpacesAsMetaspace) {
  const json always = {
      {"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "always"}, {"split", true}};
  const std::vector<Case> cases = {{"a  b ",
                                    {"\u2581"
                                     "a",
                                     "\u2581",
                                     "\u2581"
                                     "b",
                                     "\u2581"}},
                                   {"\u2581"
                                    "a",
                                    {"\u2581"
                                     "a"}},
                                   {" a",
                                    {"\u2581"
                                     "a"}}};
  expect_words(always, cases);
  // As files from before prepend_scheme and split have it.
  expect_words(
      {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"add_prefix_space", true}, {"str_rep", "\u2581"}},
      cases);
  expect_words(
      {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "never"}, {"split", false}},
      {{"a  b ",
        {"a\u2581\u2581"
         "b\u2581"}}});
}

TEST(PreTokenizer, RefusesByNameWhatItDoesNotImplement) {
  const auto expect_unsupported = [](const json& spec, const std::string& part) {
    test::expect_error(ErrorCode::kUnsupported, part, [&] { parse_pre_tokenizer(spec); });
  };
  expect_unsupported({{"type", "BertPreTokenizer"}}, "\"BertPreTokenizer\"");
  expect_unsupported(split_by("\\d+"), "\\d+");
  expect_unsupported(
      {{"type", "Split"}, {"pattern", {{"String", "-"}}}, {"behavior", "Isolated"}, {"invert", false}},
      "plain string is not implemented: \"-\"");
  json merged = split_by(kGpt2Pattern);
  merged["behavior"] = "MergedWithNext";
  expect_unsupported(merged, "MergedWithNext");
  expect_unsupported({{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "last"}},
                     "\"last\"");
}

TEST(PreTokenizer, CutsALongRunOfDigitsInOnePass) {
  // A look at the rest of the run for each piece would take 10^12 steps.
  std::vector<std::string> words = {std::string(3'000'000, '7')};
  parse_pre_tokenizer(split_by(kLlama3Pattern))(words, true);
  ASSERT_EQ(words.size(), 1'000'000u);
  EXPECT_EQ(words.front(), "777");
  EXPECT_EQ(words.back(), "777");
}

}  // namespace
}  // namespace stbllm
