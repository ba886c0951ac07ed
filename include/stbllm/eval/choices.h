#pragma once
// Multiple choice by log likelihood, with the accuracies of lm-evaluation-harness: a question is answered by
// the choice whose continuation is the likeliest given its context, as it is (acc), per character (acc_norm),
// per byte (acc_bytes) or per token (acc_tokens). Characters and bytes are those of the continuation without
// the space in front of it.

#include <cstdint>
#include <functional>
#include <vector>

#include "stbllm/eval/perplexity.h"
#include "stbllm/model/decoder.h"
#include "stbllm/text/questions.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {

/// A choice as tokens: `ids`, of which the last `scored` are the continuation.
struct ChoiceTokens {
  std::vector<int32_t> ids;
  int64_t scored = 0;
};

/// As the harness cuts them: white space at the end of a context belongs to the continuation; the
/// continuation is what the tokens of both together have beyond those of the context; an empty context is the
/// token that begins a text, or ends one where none begins it. A choice longer than the model's positions
/// loses tokens at its start. Throws Error(kUnsupported) when a continuation alone has more, or no token of
/// its own.
ChoiceTokens tokens_of(const Choice& choice, const Tokenizer& tokenizer, int64_t max_positions);

/// The log likelihood of each choice's continuation, in nats. The tokens that all choices begin with pass
/// through the model once, the rest of all choices as one batch. `decoder` keeps its blocks. Throws as
/// check_ids() does.
std::vector<double> log_likelihoods(const Decoder& decoder, const std::vector<ChoiceTokens>& choices);

/// Whether each question was answered rightly (1 or 0).
struct Answers {
  std::vector<double> acc, acc_norm, acc_bytes, acc_tokens;
  std::vector<std::vector<double>> log_likelihoods;  ///< by question and choice
};

/// `on_question` is told the number of questions done. Throws as tokens_of() and log_likelihoods() do.
Answers answer(const Decoder& decoder, const Tokenizer& tokenizer, const std::vector<Question>& questions,
               const std::function<void(int64_t done)>& on_question = {});

}  // namespace stbllm
