#pragma once
// The "pre_tokenizer" of tokenizer.json: how text is cut into the words that BPE works on.

#include <array>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace stbllm {

/// Cuts each of `words` into smaller ones, in place. `at_start` says that the first word starts the whole
/// text.
using PreTokenizer = std::function<void(std::vector<std::string>& words, bool at_start)>;

/// `spec` is null, ByteLevel, Split (by the patterns of GPT-2, LLaMA-3 or Qwen2), Digits, Metaspace or a
/// Sequence of them. Throws Error(kUnsupported) naming any other, and the pattern of a Split that is not
/// recognised.
PreTokenizer parse_pre_tokenizer(const nlohmann::json& spec);

/// The printable character that GPT-2 writes for each byte, as UTF-8: visible Latin-1 characters stand for
/// themselves, the others are numbered from U+0100.
const std::array<std::string, 256>& byte_symbols();

}  // namespace stbllm
