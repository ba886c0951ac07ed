#pragma once
// Text generation with a key/value cache: one pass over the prompt (prefill), then one token at a time
// (decode).

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "stbllm/model/decoder.h"

namespace stbllm {

struct GenerateOptions {
  int64_t max_tokens = 128;  ///< new ones
  double temperature = 0;    ///< 0: greedy; else logits are divided by it
  double top_p = 1;          ///< sample from the fewest tokens whose probabilities reach this sum, in (0, 1]
  uint64_t seed = 0;         ///< same seed, same tokens
  std::vector<int32_t> stop_ids = {};  ///< ends after one of these, which is not part of the result
};

struct Generation {
  std::vector<int32_t> ids;  ///< new tokens
  int64_t prompt_tokens = 0;
  double prefill_seconds = 0;
  double decode_seconds = 0;  ///< of the `decode_passes`, the caller's on_token included
  int64_t decode_passes = 0;  ///< single-token passes; the first token comes from the prefill
};

/// Calls on_token for every new token; generation ends early when it returns false. Stops at the model's last
/// position. Throws Error(kUsage) for an empty or too long prompt or an option out of range.
Generation generate(const Decoder& decoder, std::span<const int32_t> prompt, const GenerateOptions& options,
                    const std::function<bool(int32_t)>& on_token = {});

}  // namespace stbllm
