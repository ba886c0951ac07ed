#pragma once
// Texts that a model writes by itself, for calibration where there is no corpus (LLM-QAT, arXiv:2305.17888,
// section 3.1).

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "stbllm/base/random.h"
#include "stbllm/model/decoder.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {

struct WriteTextsOptions {
  int64_t tokens = 65536;              ///< of all texts together; the last one may exceed it
  int64_t longest = 512;               ///< tokens of a text with its start; at most the model's positions
  double temperature = 1, top_p = 1;   ///< as sample.h has them
  uint64_t seed = 0;                   ///< same seed, same texts, on one machine: logits decide
  std::vector<int32_t> stop_ids = {};  ///< ends a text after one of these, which is not part of it
};

/// What a text begins with: ids, as many at each call, which draws them from `random`.
using DrawStart = std::function<std::vector<int32_t>(SplitMix64& random)>;
/// What the tokenizer puts in front of a text, and then a token that begins a word, each as likely as any
/// other. Throws Error(kUnsupported) where no token does. The tokenizer must outlive the result.
DrawStart starts_with_word(const Tokenizer& tokenizer, const ModelSpec& spec);
/// The same, and then the first tokens of a line of a text, as read_corpus() knows it; each line is as likely
/// as any other. Throws Error(kTooLittleText) where no line has eight.
DrawStart starts_of_lines(const Tokenizer& tokenizer, const std::string& data);

/// Writes several texts at once, as many as have room in a cache of 1 GiB, and calls on_text with the ids of
/// each. Throws Error(kUsage) for an option out of range, or a start that leaves no room.
void write_texts(const Decoder& decoder, const DrawStart& draw_start, const WriteTextsOptions& options,
                 const std::function<void(std::span<const int32_t>)>& on_text);

}  // namespace stbllm
