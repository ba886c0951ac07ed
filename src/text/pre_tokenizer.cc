// Pre-tokenizers. The regular expressions of the known tokenizers are matched by hand: each alternative of
//   GPT-2    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   LLaMA-3  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}
//            | ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   Qwen2    LLaMA-3's with \p{N} in place of \p{N}{1,3}
// is one line or two of a function below, in the order of the expression. They match at every position, so a
// text is the concatenation of its words.

#include "stbllm/text/pre_tokenizer.h"

#include <algorithm>
#include <string_view>
#include <utility>

#include "stbllm/base/json_fields.h"
#include "stbllm/text/normalizer.h"
#include "stbllm/text/tokenizer_json.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

/// A text as code points with their classes. Behind the end there is U+0000 of class kOther.
class Chars {
 public:
  explicit Chars(std::string_view text) {
    chars_.reserve(text.size() + 1);
    for (size_t i = 0; i < text.size();) {
      const CodePoint point = decode_utf8(text, i);
      chars_.push_back({point.value, static_cast<uint32_t>(i), char_class(point.value)});
      i += point.length;
    }
    chars_.push_back({0, static_cast<uint32_t>(text.size()), CharClass::kOther});
  }

  size_t size() const { return chars_.size() - 1; }
  char32_t code(size_t i) const { return chars_[std::min(i, size())].code; }
  size_t byte_offset(size_t i) const { return chars_[i].byte_offset; }

  bool letter(size_t i) const { return i < size() && chars_[i].cls == CharClass::kLetter; }
  bool number(size_t i) const { return i < size() && is_number(chars_[i].cls); }
  bool space(size_t i) const { return i < size() && chars_[i].cls == CharClass::kSpace; }
  bool newline(size_t i) const { return code(i) == '\r' || code(i) == '\n'; }
  bool symbol(size_t i) const { return i < size() && !letter(i) && !number(i) && !space(i); }

  /// Where the run of characters from `i` on ends for which (this->*holds) is true.
  size_t run_end(size_t i, bool (Chars::*holds)(size_t) const) const {
    while ((this->*holds)(i)) ++i;
    return i;
  }

 private:
  struct Char {
    char32_t code;
    uint32_t byte_offset;
    CharClass cls;
  };
  std::vector<Char> chars_;
};

/// Where one of 's 't 're 've 'm 'll 'd that starts at `i` ends; `i` where there is none.
size_t contraction_end(const Chars& text, size_t i, bool any_case) {
  if (text.code(i) != '\'') return i;
  const auto lower = [&](size_t k) -> char32_t {
    const char32_t c = text.code(k);
    if (!any_case) return c;
    if (c == 0x17f) return 's';  // the long s is the only other character that folds to one of these letters
    return c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c;
  };
  const char32_t first = lower(i + 1), second = lower(i + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return i + 2;
  if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') || (first == 'l' && second == 'l')) {
    return i + 3;
  }
  return i;
}

/// \s+(?!\S)|\s+ at `i`, where there is a space: all of the run but its last character when more text
/// follows.
size_t spaces_end(const Chars& text, size_t i) {
  const size_t end = text.run_end(i, &Chars::space);
  return end < text.size() && end - i > 1 ? end - 1 : end;
}

/// Where the word that starts at `i` ends.
using WordEnd = size_t (*)(const Chars& text, size_t i);

size_t gpt2_word_end(const Chars& text, size_t i) {
  if (const size_t end = contraction_end(text, i, /*any_case=*/false); end > i) return end;
  const size_t body = i + (text.code(i) == ' ');
  if (text.letter(body)) return text.run_end(body, &Chars::letter);
  if (text.number(body)) return text.run_end(body, &Chars::number);
  if (text.symbol(body)) return text.run_end(body, &Chars::symbol);
  return spaces_end(text, i);
}

template <size_t kMaxDigits>
size_t llama3_word_end(const Chars& text, size_t i) {
  if (const size_t end = contraction_end(text, i, /*any_case=*/true); end > i) return end;
  if (text.letter(i)) return text.run_end(i, &Chars::letter);
  if (text.letter(i + 1) && !text.newline(i) && !text.number(i)) return text.run_end(i + 1, &Chars::letter);
  if (text.number(i)) {  // without a look at the whole run, which each of its pieces would repeat
    size_t end = i + 1;
    while (end < i + kMaxDigits && text.number(end)) ++end;
    return end;
  }
  const size_t body = i + (text.code(i) == ' ');
  if (text.symbol(body)) return text.run_end(text.run_end(body, &Chars::symbol), &Chars::newline);
  const size_t end = text.run_end(i, &Chars::space);
  for (size_t last = end; last > i; --last) {
    if (text.newline(last - 1)) return last;  // \s*[\r\n]+ gives back whatever follows the last newline
  }
  return spaces_end(text, i);
}

/// The expressions as tokenizer.json files spell them.
constexpr std::pair<std::string_view, WordEnd> kPatterns[] = {
    {R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)", gpt2_word_end},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     llama3_word_end<3>},
    {R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
     R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)",
     llama3_word_end<1>},
};

/// Replaces each word by its pieces; word_end gives the end of the piece that starts at a character.
template <typename End>
void split_words(std::vector<std::string>& words, End word_end) {
  std::vector<std::string> pieces;
  for (const std::string& word : words) {
    const Chars chars(word);
    for (size_t begin = 0; begin < chars.size();) {
      const size_t end = word_end(chars, begin);
      const size_t offset = chars.byte_offset(begin);
      pieces.emplace_back(word, offset, chars.byte_offset(end) - offset);
      begin = end;
    }
  }
  words = std::move(pieces);
}

PreTokenizer parse_byte_level(const nlohmann::json& spec) {
  const bool prefix_space = spec.at("add_prefix_space").get<bool>();
  const bool split = JsonFields(spec).flag("use_regex", true);
  return [=](std::vector<std::string>& words, bool) {
    if (prefix_space) {
      for (std::string& word : words) {
        if (!word.starts_with(' ')) word.insert(word.begin(), ' ');
      }
    }
    if (split) split_words(words, gpt2_word_end);
    for (std::string& word : words) {
      std::string symbols;
      for (const char byte : word) symbols += byte_symbols()[static_cast<uint8_t>(byte)];
      word = std::move(symbols);
    }
  };
}

PreTokenizer parse_split(const nlohmann::json& spec) {
  const nlohmann::json& pattern = spec.at("pattern");
  if (!pattern.contains("Regex")) {
    fail(ErrorCode::kUnsupported, "pre_tokenizer Split by a plain string is not implemented: \"{}\"",
         pattern.at("String").get<std::string>());
  }
  const auto regex = pattern.at("Regex").get<std::string>();
  const auto known = std::find_if(std::begin(kPatterns), std::end(kPatterns),
                                  [&](const auto& row) { return row.first == regex; });
  if (known == std::end(kPatterns)) {
    fail(ErrorCode::kUnsupported,
         "pre_tokenizer Split has a pattern that is not recognised (GPT-2's, LLaMA-3's and Qwen2's "
         "are): {}",
         regex);
  }
  // These patterns match everything, so that keeping the matches and dropping what lies between are the same.
  const auto behavior = spec.at("behavior").get<std::string>();
  const bool invert = spec.at("invert").get<bool>();
  if (!(behavior == "Isolated" && !invert) && !(behavior == "Removed" && invert)) {
    fail(ErrorCode::kUnsupported, "pre_tokenizer Split with behavior {} and invert {} is not implemented",
         behavior, invert);
  }
  return [word_end = known->second](std::vector<std::string>& words, bool) { split_words(words, word_end); };
}

PreTokenizer parse_digits(const nlohmann::json& spec) {
  const bool individual = JsonFields(spec).flag("individual_digits", false);
  return [=](std::vector<std::string>& words, bool) {
    split_words(words, [=](const Chars& text, size_t i) {
      if (text.number(i)) return individual ? i + 1 : text.run_end(i, &Chars::number);
      while (i < text.size() && !text.number(i)) ++i;
      return i;
    });
  };
}

PreTokenizer parse_metaspace(const nlohmann::json& spec) {
  const auto mark = spec.at("replacement").get<std::string>();
  if (mark.empty() || decode_utf8(mark, 0).length != static_cast<int>(mark.size())) {
    fail(ErrorCode::kCorrupt, "pre_tokenizer Metaspace needs one character as replacement, found \"{}\"",
         mark);
  }
  // Files from before "prepend_scheme" say "add_prefix_space".
  const std::string by_age = JsonFields(spec).flag("add_prefix_space", true) ? "always" : "never";
  const std::string scheme = JsonFields(spec).text("prepend_scheme", by_age);
  if (scheme != "always" && scheme != "first" && scheme != "never") {
    fail(ErrorCode::kUnsupported, "pre_tokenizer Metaspace with prepend_scheme \"{}\" is not implemented",
         scheme);
  }
  const bool split = JsonFields(spec).flag("split", true);
  return [=, mark_code = decode_utf8(mark, 0).value](std::vector<std::string>& words, bool at_start) {
    for (size_t i = 0; i < words.size(); ++i) {
      replace_all(words[i], " ", mark);
      const bool prepend = scheme == "always" || (scheme == "first" && i == 0 && at_start);
      if (prepend && !words[i].starts_with(mark)) words[i].insert(0, mark);
    }
    if (!split) return;
    split_words(words, [=](const Chars& text, size_t i) {
      do ++i;
      while (i < text.size() && text.code(i) != mark_code);
      return i;
    });
  };
}

PreTokenizer parse_step(const nlohmann::json& spec) {
  const std::string type = component_type(spec);
  if (type == "ByteLevel") return parse_byte_level(spec);
  if (type == "Split") return parse_split(spec);
  if (type == "Digits") return parse_digits(spec);
  if (type == "Metaspace") return parse_metaspace(spec);
  fail(ErrorCode::kUnsupported,
       "pre_tokenizer \"{}\" is not implemented (these are: Sequence, ByteLevel, Split, Digits, "
       "Metaspace)",
       type);
}

}  // namespace

PreTokenizer parse_pre_tokenizer(const nlohmann::json& spec) {
  std::vector<PreTokenizer> steps;
  for_each_component(spec, "pretokenizers",
                     [&](const nlohmann::json& step) { steps.push_back(parse_step(step)); });
  return [steps = std::move(steps)](std::vector<std::string>& words, bool at_start) {
    const size_t before = total_bytes(words);
    for (const PreTokenizer& step : steps) {
      step(words, at_start);
      check_growth(before, total_bytes(words));
    }
  };
}

const std::array<std::string, 256>& byte_symbols() {
  static const auto symbols = [] {
    std::array<std::string, 256> table;
    char32_t next = 0x100;
    for (char32_t byte = 0; byte < table.size(); ++byte) {
      const bool visible = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      append_utf8(table[byte], visible ? byte : next++);
    }
    return table;
  }();
  return symbols;
}

}  // namespace stbllm
