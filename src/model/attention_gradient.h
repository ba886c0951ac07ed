#pragma once
// The gradients of causal_attention().

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace stbllm {

struct AttentionGradients {
  at::Tensor queries, keys, values;  // in the shapes and the dtype of the inputs
};

/// queries, keys, values and window as causal_attention() takes them with first = 0; `out_gradient` (batch,
/// tokens, heads * head_dim). Scores are float32, other products in the dtype of the inputs.
AttentionGradients attention_gradients(const at::Tensor& queries, const at::Tensor& keys,
                                       const at::Tensor& values, int64_t window,
                                       const at::Tensor& out_gradient);

}  // namespace stbllm
