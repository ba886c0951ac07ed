#pragma once
// tokenizer.model: the protocol buffer that SentencePiece writes.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace stbllm {

/// The tokenizer.json that HuggingFace makes of `bytes`: BPE with byte fallback, whose merges are all pairs
/// of pieces that together are a piece, ranked by its score. `legacy` and `add_prefix_space` are those of
/// tokenizer_config.json. Throws Error(kCorrupt) for a damaged file, Error(kUnsupported) for another model
/// type or a normalization table.
nlohmann::json tokenizer_json_from_sentencepiece(std::string_view bytes, bool legacy, bool add_prefix_space);

}  // namespace stbllm
