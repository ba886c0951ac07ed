#pragma once
// The "decoder" of tokenizer.json: how the tokens of ids become text again.

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace stbllm {

/// The text of `tokens`, valid UTF-8: bytes that form no character become U+FFFD.
using TokenDecoder = std::function<std::string(std::vector<std::string> tokens)>;

/// `spec` is null (tokens joined by spaces), ByteLevel, Metaspace, Replace (of a string), ByteFallback, Fuse,
/// Strip or a Sequence of them. Throws Error(kUnsupported) naming any other.
TokenDecoder parse_token_decoder(const nlohmann::json& spec);

}  // namespace stbllm
