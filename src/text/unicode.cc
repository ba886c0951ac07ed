// UTF-8, character classes and NFC. The tables are generated: scripts/make_unicode_table.py.

#include "stbllm/text/unicode.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <tuple>

namespace stbllm {
namespace {

struct Decomposition {
  uint32_t code, first, second;  // second is 0 when one character replaces another
};

#include "unicode_table.inc"

// Hangul syllables compose and decompose by arithmetic (Unicode, section 3.12).
constexpr char32_t kHangulBase = 0xac00, kLeadBase = 0x1100, kVowelBase = 0x1161, kTailBase = 0x11a7;
constexpr char32_t kLeads = 19, kVowels = 21, kTails = 28, kSyllables = kLeads * kVowels * kTails;

/// The value of the run that holds `code`; runs are code * scale + value, sorted, the first one starts at 0.
template <size_t kSize>
uint32_t run_value(const uint32_t (&runs)[kSize], char32_t code, uint32_t scale) {
  return *std::prev(std::upper_bound(std::begin(runs), std::end(runs), code * scale + scale - 1)) % scale;
}

uint32_t combining_class(char32_t code) { return run_value(kCombiningRuns, code, 256); }

void append_decomposed(char32_t code, std::u32string& out) {
  if (const char32_t syllable = code - kHangulBase; syllable < kSyllables) {
    out += kLeadBase + syllable / (kVowels * kTails);
    out += kVowelBase + syllable / kTails % kVowels;
    if (syllable % kTails != 0) out += kTailBase + syllable % kTails;
    return;
  }
  const auto* entry = std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), code,
                                       [](const Decomposition& d, char32_t c) { return d.code < c; });
  if (entry == std::end(kDecompositions) || entry->code != code) {
    out += code;
    return;
  }
  append_decomposed(entry->first, out);
  if (entry->second != 0) append_decomposed(entry->second, out);
}

/// The character that `first` and `second` compose to, 0 when there is none.
char32_t compose(char32_t first, char32_t second) {
  if (first - kLeadBase < kLeads && second - kVowelBase < kVowels) {
    return kHangulBase + ((first - kLeadBase) * kVowels + (second - kVowelBase)) * kTails;
  }
  if (first - kHangulBase < kSyllables && (first - kHangulBase) % kTails == 0 && second > kTailBase &&
      second < kTailBase + kTails) {
    return first + (second - kTailBase);
  }
  const auto key = std::pair<uint32_t, uint32_t>(first, second);
  const auto pair_of = [](uint16_t i) {
    return std::pair(kDecompositions[i].first, kDecompositions[i].second);
  };
  const auto* entry = std::lower_bound(std::begin(kCompositions), std::end(kCompositions), key,
                                       [&](uint16_t i, const auto& k) { return pair_of(i) < k; });
  if (entry == std::end(kCompositions) || pair_of(*entry) != key) return 0;
  return kDecompositions[*entry].code;
}

}  // namespace

CodePoint decode_utf8(std::string_view text, size_t position) {
  const auto byte_at = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte_at(position);
  if (lead < 0x80) return {lead, 1, true};
  // Unicode, table 3-7: the first continuation byte's range excludes overlong forms, surrogates and codes
  // past 10FFFF.
  uint8_t low = 0x80, high = 0xbf;
  int more;
  char32_t value;
  if (lead >= 0xc2 && lead <= 0xdf) {
    more = 1, value = lead - 0xc0u;
  } else if (lead >= 0xe0 && lead <= 0xef) {
    more = 2, value = lead - 0xe0u;
    if (lead == 0xe0) low = 0xa0;
    if (lead == 0xed) high = 0x9f;
  } else if (lead >= 0xf0 && lead <= 0xf4) {
    more = 3, value = lead - 0xf0u;
    if (lead == 0xf0) low = 0x90;
    if (lead == 0xf4) high = 0x8f;
  } else {
    return {0xfffd, 1, false};
  }
  for (int i = 1; i <= more; ++i) {
    if (position + i >= text.size() || byte_at(position + i) < low || byte_at(position + i) > high) {
      return {0xfffd, i, false};
    }
    value = value * 64 + (byte_at(position + i) - 0x80u);
    low = 0x80, high = 0xbf;
  }
  return {value, more + 1, true};
}

void append_utf8(std::string& text, char32_t code) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(static_cast<uint8_t>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 + code / 64), put(0x80 + code % 64);
  } else if (code < 0x10000) {
    put(0xe0 + code / 4096), put(0x80 + code / 64 % 64), put(0x80 + code % 64);
  } else {
    put(0xf0 + code / 262144), put(0x80 + code / 4096 % 64), put(0x80 + code / 64 % 64),
        put(0x80 + code % 64);
  }
}

size_t find_invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const CodePoint point = decode_utf8(text, i);
    if (!point.valid) return i;
    i += point.length;
  }
  return std::string_view::npos;
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  for (size_t i = 0; i < bytes.size();) {
    const CodePoint point = decode_utf8(bytes, i);
    append_utf8(text, point.value);
    i += point.length;
  }
  return text;
}

CharClass char_class(char32_t code) {
  // Most characters of most texts are ASCII, where a binary search would cost more than all the rest of
  // splitting.
  static const auto ascii = [] {
    std::array<CharClass, 128> table;
    for (char32_t c = 0; c < table.size(); ++c)
      table[c] = static_cast<CharClass>(run_value(kClassRuns, c, 8));
    return table;
  }();
  return code < ascii.size() ? ascii[code] : static_cast<CharClass>(run_value(kClassRuns, code, 8));
}

std::string normalize_nfc(std::string_view text) {
  // Characters below U+0300 (lead byte cc) are their own NFC and none of them combines with another.
  const auto plain = [](char c) { return static_cast<uint8_t>(c) < 0xcc; };
  if (std::all_of(text.begin(), text.end(), plain)) return std::string(text);

  std::u32string chars;
  for (size_t i = 0; i < text.size();) {
    const CodePoint point = decode_utf8(text, i);
    append_decomposed(point.value, chars);
    i += point.length;
  }
  // Canonical order: marks between two starters (class 0) by class.
  for (auto mark = chars.begin(); mark != chars.end();) {
    if (combining_class(*mark) == 0) {
      ++mark;
      continue;
    }
    const auto end = std::find_if(mark, chars.end(), [](char32_t c) { return combining_class(c) == 0; });
    std::stable_sort(mark, end,
                     [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    mark = end;
  }
  // Compose each character with the last starter unless one of the same or a higher class stands between
  // them.
  std::u32string composed;
  size_t starter = std::u32string::npos;
  uint32_t last_class = 0;
  for (const char32_t c : chars) {
    const uint32_t cc = combining_class(c);
    const bool adjacent = starter + 1 == composed.size();
    if (starter != std::u32string::npos && (adjacent || last_class < cc)) {
      if (const char32_t both = compose(composed[starter], c)) {
        composed[starter] = both;
        continue;
      }
    }
    if (cc == 0) starter = composed.size();
    last_class = cc;
    composed += c;
  }
  std::string result;
  for (const char32_t c : composed) append_utf8(result, c);
  return result;
}

}  // namespace stbllm
