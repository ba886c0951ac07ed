#pragma once
// How far a model's predictions are from another's, position by position over windows:
//   KL(reference || model) = sum_v p_v (log p_v - log q_v), and how often both prefer the same token.

#include <cstdint>

#include "stbllm/eval/perplexity.h"

namespace stbllm {

struct Divergence {
  double mean_kl = 0;         ///< nats per position
  double kl_error = 0;        ///< standard error of mean_kl over windows
  double top1_agreement = 0;  ///< share of positions, 0 .. 1
  Perplexity reference;
  Perplexity model;
};

/// Both decoders have the same vocabulary, else Error(kMismatch). Memory is bounded and windows are checked
/// as in evaluate_perplexity.
Divergence evaluate_divergence(const Decoder& reference, const Decoder& model, const Windows& windows,
                               int64_t hidden_bytes = EvaluationOptions{}.hidden_bytes);

}  // namespace stbllm
