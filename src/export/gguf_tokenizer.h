#pragma once
// A tokenizer as keys of a GGUF file.

#include <cstdint>

#include "stbllm/export/gguf_writer.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {

/// `vocab`: rows of the embedding, of which those without a token get one that no text has. Throws
/// Error(kUnsupported) for a tokenizer that llama.cpp has no name for.
void add_tokenizer(GgufWriter& file, const Tokenizer& tokenizer, int64_t vocab);

}  // namespace stbllm
