// tokenizer.model: what it makes of a text, and of its ids.

#include "fuzz/fuzz_target.h"
#include "stbllm/text/tokenizer.h"

STBLLM_FUZZ_TARGET(sentencepiece) {
  stbllm::fuzz::allow_error([&] {
    const auto path = stbllm::fuzz::file_of(bytes, "tokenizer.model");
    const auto tokenizer = stbllm::Tokenizer::load(path.parent_path());
    tokenizer->decode(tokenizer->encode("Hello  wörld, it's 2024!\n\t<s>the end</s> \u4f60\u597d"));
    stbllm::Tokenizer::from_serialized(tokenizer->serialize());
  });
}
