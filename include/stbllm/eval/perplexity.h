#pragma once
// Perplexity by the GPTQ protocol: non-overlapping windows; every window predicts its tokens 1 .. seqlen - 1;
// mean NLL over all predicted tokens; perplexity = exp(mean NLL). Natural logarithms.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "stbllm/model/hidden_stream.h"

namespace stbllm {

struct Perplexity {
  double mean_nll = 0;
  double nll_error = 0;         ///< standard error of mean_nll over windows; 0 for a single window
  double perplexity = 0;        ///< exp(mean_nll)
  double perplexity_error = 0;  ///< perplexity * nll_error
  int64_t windows = 0;
  int64_t seqlen = 0;
  int64_t tokens = 0;  ///< those that were scored, of all windows
  double seconds = 0;
  double tokens_per_second = 0;    ///< windows * seqlen / seconds
  std::vector<double> window_nll;  ///< mean NLL of each window
};

struct EvaluationOptions {
  /// Bound on the hidden states of windows that go through the blocks together. Results do not depend on it.
  int64_t hidden_bytes = int64_t{1} << 30;
  /// Score the second half of each window only, given the first, as llama.cpp's llama-perplexity does: it
  /// predicts the tokens seqlen / 2 + 1 .. seqlen - 1.
  bool second_half = false;
};

/// Runs chunks of windows block after block (each block is loaded once per chunk), the head over a few tokens
/// at a time. Throws as check_windows does.
Perplexity evaluate_perplexity(const Decoder& decoder, const Windows& windows,
                               const EvaluationOptions& options = {});

// --- the parts, shared with divergence and with the verification of a packed file ---

/// The first token of a window that is scored. Throws Error(kUsage) when windows have no second half.
int64_t first_scored_token(int64_t seqlen, const EvaluationOptions& options);

/// How many windows stay within the bound; a multiple of what goes through a block in one call.
int64_t windows_per_chunk(const Decoder& decoder, int64_t seqlen, const EvaluationOptions& options);

/// Hidden states (windows, seqlen, hidden) that leave the last block, in the decoder's dtype: all the windows
/// go through block after block. `on_block` is told the number of blocks done.
at::Tensor final_hidden_states(const Decoder& decoder, std::span<const std::vector<int32_t>> windows,
                               const std::function<void(int64_t blocks)>& on_block = {});

/// Tokens whose float32 log-probabilities are held at a time.
int64_t tokens_per_head_pass(const Decoder& decoder);
/// Log-softmax in float32 (tokens, vocab) of the logits of hidden states (tokens, hidden).
at::Tensor log_probabilities(const Decoder& decoder, const at::Tensor& hidden);

/// NLL of the tokens from `first_token` >= 1 on, float64, from the hidden states (tokens, hidden) of one
/// window.
at::Tensor token_nll(const Decoder& decoder, const at::Tensor& hidden, const std::vector<int32_t>& window,
                     int64_t first_token = 1);

struct MeanAndError {
  double mean = 0;
  double error = 0;  ///< standard error of the mean; 0 for a single value
};
MeanAndError mean_and_error(const std::vector<double>& values);

/// The figures of windows whose mean NLLs, over `scored` tokens each, are given.
Perplexity summarize(std::vector<double> window_nll, int64_t seqlen, int64_t scored, double seconds);

}  // namespace stbllm
