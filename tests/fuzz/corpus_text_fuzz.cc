// Texts in each form that is read: plain, rows of Wikitext, JSON lines, and each of them gzipped. The first
// byte of an input says which, the rest is the file.

#include <array>

#include "fuzz/fuzz_target.h"
#include "stbllm/text/corpus.h"

STBLLM_FUZZ_TARGET(corpus_text) {
  // Named so that the digits 0 to 5 choose them in this order.
  constexpr std::array kNames = {"t.txt", "t.raw", "t.jsonl", "t.txt.gz", "t.raw.gz", "t.jsonl.gz"};
  static_assert('0' % kNames.size() == 0);
  if (bytes.empty()) return;
  const char* name = kNames[static_cast<size_t>(bytes[0]) % kNames.size()];
  const auto path = stbllm::fuzz::file_of(bytes.subspan(1), name);
  stbllm::fuzz::allow_error([&] { stbllm::read_corpus(path.string()); });
}
