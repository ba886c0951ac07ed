#include "stbllm/text/corpus.h"

#include <zlib.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/random.h"
#include "stbllm/base/text_file.h"
#include "stbllm/text/sha256.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kSeparator = "\n\n";  // between rows, between documents

/// A corpus with a name of its own. `sha256` is that of the text as read_corpus returns it; where it is
/// empty, nothing is checked.
struct KnownCorpus {
  std::string_view name, file, description, sha256;
};
constexpr KnownCorpus kKnownCorpora[] = {
    {"wikitext2", "wiki.test.raw", "wikitext-2-raw-v1 test",
     "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"},
    {"wikitext2-valid", "wiki.valid.raw", "wikitext-2-raw-v1 validation",
     "b44fb967f92b525731216a507d1fbc44b97446b7ef0a2b4d1a893f81f1bbc29e"},
    {"c4", "c4-sample.txt", "C4 sample", ""},  // samples differ from place to place
};

std::string read_gzip(const fs::path& path) {
  const std::unique_ptr<gzFile_s, decltype(&gzclose)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (file == nullptr) fail(ErrorCode::kNotFound, "{}: cannot open", path.string());
  std::string text;
  char buffer[1 << 16];
  int count;
  while ((count = gzread(file.get(), buffer, sizeof buffer)) > 0)
    if (text.append(buffer, count).size() > kMaxTextBytes)
      fail(ErrorCode::kUnsupported, "{}: more than {} bytes of text; use a part of it", path.string(),
           kMaxTextBytes);
  int status = Z_OK;
  const char* message = gzerror(file.get(), &status);
  if (status == Z_BUF_ERROR) fail(ErrorCode::kCorrupt, "{}: the gzip file is truncated", path.string());
  if (count < 0) fail(ErrorCode::kCorrupt, "{}: damaged gzip file: {}", path.string(), message);
  if (gzdirect(file.get())) fail(ErrorCode::kCorrupt, "{}: not a gzip file", path.string());
  return text;
}

/// Calls visit(line, number from 1) for each line, its newline included.
template <typename Visit>
void for_each_line(std::string_view text, Visit visit) {
  int64_t number = 0;
  while (!text.empty()) {
    const size_t newline = text.find('\n');
    const std::string_view line =
        text.substr(0, newline == std::string_view::npos ? text.size() : newline + 1);
    visit(line, ++number);
    text.remove_prefix(line.size());
  }
}

/// Joins pieces of a text as they arrive.
class Joiner {
 public:
  void add(std::string_view piece) {
    if (count_++ > 0) text_ += kSeparator;
    text_ += piece;
  }
  int64_t count() const { return count_; }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
  int64_t count_ = 0;
};

void check_utf8(std::string_view text, const fs::path& path) {
  const size_t at = find_invalid_utf8(text);
  if (at == std::string_view::npos) return;
  fail(ErrorCode::kCorrupt, "{}: line {} (byte {}) is not UTF-8; convert the text first", path.string(),
       1 + std::count(text.begin(), text.begin() + at, '\n'), at);
}

std::string document_text(std::string_view line, int64_t number, const fs::path& path) {
  try {
    return parse_json(line).at("text").get<std::string>();
  } catch (const nlohmann::json::exception& error) {
    fail(ErrorCode::kCorrupt, "{}: line {}: expected a JSON object with a string \"text\": {}", path.string(),
         number, error.what());
  }
}

Corpus read_file(const fs::path& path) {
  fs::path name = path.filename();
  const bool gzip = name.extension() == ".gz";
  const std::string content = gzip ? read_gzip(path) : read_text(path);
  if (content.empty()) fail(ErrorCode::kCorrupt, "{}: the file is empty", path.string());
  if (gzip) name = name.stem();

  Corpus corpus;
  Joiner joiner;
  std::string unit;
  if (name.extension() == ".jsonl") {
    for_each_line(content, [&](std::string_view line, int64_t number) {
      if (line.find_first_not_of(" \t\r\n") != std::string_view::npos)
        joiner.add(document_text(line, number, path));
    });
    unit = "documents";
  } else {
    check_utf8(content, path);
    if (name.extension() == ".raw") {
      for_each_line(content, [&](std::string_view line, int64_t) { joiner.add(line == " \n" ? "" : line); });
      unit = "rows";
    }
  }
  corpus.text = unit.empty() ? content : joiner.take();
  corpus.sha256 = sha256(corpus.text);
  corpus.description = replace_invalid_utf8(path.filename().string());  // JSON needs UTF-8
  for (const KnownCorpus& known : kKnownCorpora) {  // a known text goes by its name wherever it lies
    if (corpus.sha256 == known.sha256) corpus.description = known.description;
  }
  if (!unit.empty()) corpus.description += fmt::format(" ({} {})", joiner.count(), unit);
  return corpus;
}

Corpus read_known(const KnownCorpus& known) {
  std::vector<fs::path> directories = {"data", "../shared/data"};
  if (const char* directory = std::getenv("STBLLM_DATA")) directories.insert(directories.begin(), directory);
  std::string tried;
  for (const fs::path& directory : directories) {
    const fs::path path = directory / known.file;
    if (std::error_code ignored; !fs::exists(path, ignored)) {
      tried += (tried.empty() ? "" : ", ") + path.string();
      continue;
    }
    Corpus corpus = read_file(path);
    if (!known.sha256.empty() && corpus.sha256 != known.sha256) {
      fail(ErrorCode::kMismatch,
           "{}: this is not {}: its text has SHA-256 {}, expected {}; to use it all the same, give its "
           "path instead of \"{}\"",
           path.string(), known.description, corpus.sha256, known.sha256, known.name);
    }
    return corpus;
  }
  fail(ErrorCode::kNotFound,
       "{}: found none of {}; set STBLLM_DATA to the directory that has {}, or give the path of a text",
       known.name, tried, known.file);
}

void check_seqlen(int64_t seqlen) {
  if (seqlen < 1) fail(ErrorCode::kUsage, "the sequence length is {}, expected at least 1", seqlen);
}

}  // namespace

Corpus read_corpus(const std::string& data) {
  for (const KnownCorpus& known : kKnownCorpora) {
    if (data == known.name) return read_known(known);
  }
  if (std::error_code ignored; !fs::exists(data, ignored)) {
    fail(ErrorCode::kNotFound, "{}: no such text; expected a file, or one of wikitext2, wikitext2-valid, c4",
         data);
  }
  return read_file(data);
}

std::vector<std::vector<int32_t>> evaluation_windows(const std::vector<int32_t>& ids, int64_t seqlen,
                                                     int64_t max_windows, std::string_view what) {
  check_seqlen(seqlen);
  int64_t count = static_cast<int64_t>(ids.size()) / seqlen;
  if (count == 0) {
    fail(ErrorCode::kTooLittleText,
         "{} has {} tokens, fewer than one window of {}; use a longer text or a smaller seqlen", what,
         ids.size(), seqlen);
  }
  if (max_windows > 0) count = std::min(count, max_windows);
  std::vector<std::vector<int32_t>> windows;
  for (int64_t i = 0; i < count; ++i)
    windows.emplace_back(ids.begin() + i * seqlen, ids.begin() + (i + 1) * seqlen);
  return windows;
}

std::vector<std::vector<int32_t>> calibration_windows(const std::vector<int32_t>& ids, int64_t count,
                                                      HeldOut held_out, int64_t seqlen, uint64_t seed,
                                                      std::string_view what) {
  check_seqlen(seqlen);
  const int64_t starts = static_cast<int64_t>(ids.size()) - seqlen + 1;
  if (starts <= 0) {
    fail(ErrorCode::kTooLittleText,
         "{} has {} tokens, one calibration window of {} needs more; use a longer text or a "
         "smaller seqlen",
         what, ids.size(), seqlen);
  }
  SplitMix64 random(seed);
  const int64_t places = static_cast<int64_t>(ids.size()) / seqlen;
  const int64_t shift = static_cast<int64_t>(random.below(ids.size() - places * seqlen + 1));
  std::vector<int64_t> place(places);
  std::iota(place.begin(), place.end(), 0);
  // Places go to the windows in turn, and where they are too few to the held-out ones before those behind
  // them.
  STBLLM_CHECK(held_out.first + held_out.count <= count, "{} held-out windows from {} on, of {}",
               held_out.count, held_out.first, count);
  const int64_t before = std::clamp<int64_t>(places - held_out.count, 0, held_out.first);
  std::vector<int64_t> begin(count, -1);
  int64_t taken = 0;
  for (int64_t i = 0; i < count && taken < places; ++i) {
    if (i >= before && i < held_out.first) continue;
    std::swap(place[taken], place[taken + static_cast<int64_t>(random.below(places - taken))]);
    begin[i] = shift + place[taken++] * seqlen;
  }
  const bool avoidable = places > held_out.count;  // another place than theirs is left
  const auto overlaps_held_out = [&](int64_t start) {
    for (int64_t i = held_out.first; i < held_out.first + held_out.count; ++i)
      if (begin[i] >= 0 && std::abs(start - begin[i]) < seqlen) return true;
    return false;
  };
  std::vector<std::vector<int32_t>> windows;
  for (int64_t i = 0; i < count; ++i) {
    while (begin[i] < 0)
      if (const auto start = static_cast<int64_t>(random.below(starts));
          !avoidable || !overlaps_held_out(start))
        begin[i] = start;
    windows.emplace_back(ids.begin() + begin[i], ids.begin() + begin[i] + seqlen);
  }
  return windows;
}

}  // namespace stbllm
