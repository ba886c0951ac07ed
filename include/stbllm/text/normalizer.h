#pragma once
// The "normalizer" of tokenizer.json: what happens to text before it is cut into words.

#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace stbllm {

/// Changes one stretch of text between added tokens.
using Normalizer = std::function<void(std::string& text)>;

/// `spec` is null, Prepend, Replace (of a string), NFC or a Sequence of them. Throws Error(kUnsupported)
/// naming any other.
Normalizer parse_normalizer(const nlohmann::json& spec);

/// Replaces every occurrence of `pattern` (not empty), left to right. Throws as check_growth() does.
void replace_all(std::string& text, const std::string& pattern, const std::string& content);

}  // namespace stbllm
