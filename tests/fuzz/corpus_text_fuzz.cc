// Texts in each form that is read: plain, rows of Wikitext, JSON lines, and each of them gzipped.

#include "fuzz/fuzz_target.h"
#include "stbllm/text/corpus.h"

STBLLM_FUZZ_TARGET(corpus_text) {
  for (const char* name : {"t.txt", "t.raw", "t.jsonl", "t.txt.gz", "t.raw.gz", "t.jsonl.gz"}) {
    const auto path = stbllm::fuzz::file_of(bytes, name);
    stbllm::fuzz::allow_error([&] { stbllm::read_corpus(path.string()); });
  }
}
