#pragma once
// Texts, and the windows of tokens that are cut from them.

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/text/tokenizer.h"

namespace stbllm {

/// One text, and where it came from.
struct Corpus {
  std::string text;         ///< UTF-8
  std::string description;  ///< what reports call it: "wikitext-2-raw-v1 test (4358 rows)" or a file name
  std::string sha256;       ///< of `text`, so that two runs can tell that they used the same
};

/// Reads `data`:
///   - "wikitext2", "wikitext2-valid" and "c4" are known texts. They are looked for in $STBLLM_DATA, ./data
///   and
///     ../shared/data as wiki.test.raw, wiki.valid.raw and c4-sample.txt.
///   - A .raw file is one of Wikitext-2, whose rows are those of the HF data set: the line " \n" is the row
///   "",
///     every other line with its newline is a row. Rows are joined by "\n\n".
///   - A .jsonl file has an object with a "text" per line; these documents are joined by "\n\n".
///   - Any other file is one UTF-8 text.
/// Each file may be gzipped and is then called .raw.gz and so on.
/// Throws Error(kNotFound) with the places that were tried; Error(kCorrupt) for invalid UTF-8 or JSON, with
/// line number, and for a damaged .gz; Error(kMismatch) when "wikitext2" or "wikitext2-valid" finds another
/// text (by SHA-256).
Corpus read_corpus(const std::string& data);

/// Non-overlapping windows from the start of `ids` (GPTQ's protocol); the incomplete last one is dropped.
/// At most `max_windows` of them when that is positive. Throws Error(kTooLittleText) when there is none.
std::vector<std::vector<int32_t>> evaluation_windows(const std::vector<int32_t>& ids, int64_t seqlen,
                                                     int64_t max_windows, std::string_view what);

/// The windows that training must not see: those with the numbers first to first + count - 1.
struct HeldOut {
  int64_t first = 0, count = 0;
};

/// `count` windows of `seqlen` ids at random places of `ids`, drawn by SplitMix64(seed), so that the same
/// seed gives the same windows on every machine. They do not overlap while the text lasts; when it is used
/// up, starts are drawn uniformly from [0, ids.size() - seqlen], but never so that a window overlaps a
/// held-out one, unless those are the whole text. While the text lasts a larger count begins with the windows
/// of a smaller one. Throws Error(kTooLittleText) unless ids.size() >= seqlen.
std::vector<std::vector<int32_t>> calibration_windows(const std::vector<int32_t>& ids, int64_t count,
                                                      HeldOut held_out, int64_t seqlen, uint64_t seed,
                                                      std::string_view what);

}  // namespace stbllm
