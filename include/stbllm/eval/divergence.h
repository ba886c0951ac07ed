#pragma once
// How far a model's predictions are from another's, position by position over windows:
//   KL(reference || model) = sum_v p_v (log p_v - log q_v), and how often both prefer the same token.

#include <cstdint>

#include "stbllm/eval/perplexity.h"

namespace stbllm {

struct Divergence {
  double mean_kl = 0;         ///< nats per token
  double kl_error = 0;        ///< standard error of mean_kl over windows
  double top1_agreement = 0;  ///< share of positions, 0 .. 1
  double max_logit_difference =
      0;               ///< largest |difference| of two log-probabilities of predicted (actual next) tokens
  int64_t tokens = 0;  ///< positions compared
  Perplexity reference;
  Perplexity model;
};

/// Both decoders have the same vocabulary. Memory is bounded as in evaluate_perplexity. Errors as there.
Divergence evaluate_divergence(const Decoder& reference, const Decoder& model, const Windows& windows,
                               const EvaluationOptions& options = {});

}  // namespace stbllm
