#pragma once
// Perplexity by the GPTQ protocol: non-overlapping windows; every window predicts its tokens 1 .. seqlen - 1;
// mean NLL over all predicted tokens; perplexity = exp(mean NLL). Natural logarithms.

#include <cstdint>
#include <vector>

#include "stbllm/model/decoder.h"

namespace stbllm {

using Windows = std::vector<std::vector<int32_t>>;  ///< equally long token windows

struct Perplexity {
  double mean_nll = 0;
  double nll_error = 0;         ///< standard error of mean_nll over windows; 0 for a single window
  double perplexity = 0;        ///< exp(mean_nll)
  double perplexity_error = 0;  ///< perplexity * nll_error
  int64_t windows = 0;
  int64_t seqlen = 0;
  int64_t tokens = 0;  ///< predicted ones: windows * (seqlen - 1)
  double seconds = 0;
  double tokens_per_second = 0;    ///< windows * seqlen / seconds
  std::vector<double> window_nll;  ///< mean NLL of each window
};

struct EvaluationOptions {
  int64_t hidden_bytes =
      int64_t{1} << 30;  ///< bound on the hidden states of the windows that go through the blocks together
};

/// Sums of a window's results, from which both perplexity and divergence are made.
Perplexity summarize(std::vector<double> window_nll, int64_t seqlen, double seconds);

/// Runs chunks of windows block after block (each block is loaded once per chunk), the head over a few tokens
/// at a time. The same result for every chunk size. Throws Error(kUsage) when windows are empty, unequal,
/// shorter than two tokens or longer than the model's positions; Error(kMismatch) for an id beyond the
/// vocabulary.
Perplexity evaluate_perplexity(const Decoder& decoder, const Windows& windows,
                               const EvaluationOptions& options = {});

/// Hidden states that leave the last block, (windows, seqlen, hidden), in the decoder's dtype: block after
/// block over all the windows given. The part that perplexity, divergence and verification share.
/// `on_block(done)` reports blocks.
at::Tensor final_hidden_states(const Decoder& decoder, const Windows& windows,
                               const std::function<void(int64_t)>& on_block = {});

/// NLL (tokens - 1) of each token but the first, float64, from the hidden states (tokens, hidden) of one
/// window.
at::Tensor token_nll(const Decoder& decoder, const at::Tensor& hidden, const std::vector<int32_t>& window);

}  // namespace stbllm
