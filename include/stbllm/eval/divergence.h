#pragma once
// How far models' predictions are from another's, position by position over windows:
//   KL(reference || model) = sum_v p_v (log p_v - log q_v), and how often both prefer the same token.

#include <cstdint>
#include <span>
#include <vector>

#include "stbllm/eval/perplexity.h"

namespace stbllm {

/// Errors are standard errors over windows.
struct ModelDivergence {
  double mean_kl = 0;  ///< nats per position
  double kl_error = 0;
  double nll_difference = 0;  ///< mean NLL of the model minus that of the reference, window by window
  double difference_error = 0;
  double top1_agreement = 0;  ///< share of positions, 0 .. 1
  std::vector<double> window_kl;
  Perplexity model;
};

struct Divergence {
  Perplexity reference;
  std::vector<ModelDivergence> models;
};

/// All decoders have the same vocabulary, else Error(kMismatch). Memory is bounded and windows are checked as
/// in evaluate_perplexity.
Divergence evaluate_divergence(const Decoder& reference, std::span<const Decoder* const> models,
                               const Windows& windows, const EvaluationOptions& options = {});

}  // namespace stbllm
