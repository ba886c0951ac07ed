#pragma once
// How the next token is drawn from a model's logits.

#include <cstdint>
#include <span>

#include "stbllm/base/random.h"

namespace stbllm {

/// Throws Error(kUsage) where these are not what sample() takes.
void check_sampling(double temperature, double top_p);

/// Draws from softmax(logits / temperature) restricted to the fewest tokens whose probabilities reach
/// `top_p`, in (0, 1]; the likeliest token at temperature 0. Equal logits are ordered by id, so that the
/// result is defined. Throws Error(kCorrupt) when logits are not finite.
int32_t sample(std::span<const float> logits, double temperature, double top_p, SplitMix64& random);

}  // namespace stbllm
