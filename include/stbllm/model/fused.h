#pragma once
// What takes libtorch several passes over memory and as many calls, in one: a generated token of a small
// model spends more time between its products than in them. On the CPU and without autograd; elsewhere
// DecoderBlock composes libtorch's operations.

#include <ATen/core/Tensor.h>

namespace stbllm {

/// Whether the functions below and causal_attention() take x: on the CPU, float32 or bfloat16, rows adjacent,
/// nobody records gradients.
bool can_fuse(const at::Tensor& x);

/// HF's RMS norm over the last dimension: statistics in float32, rounded to x's dtype before `weight` (width,
/// x's dtype, or undefined) is applied.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// HF's rotary positions, x * cos + rotate_half(x) * sin, rounded to x's dtype after every operation as
/// there. x (batch, heads, tokens, head_dim); cos and sin (tokens, head_dim) in x's dtype. The result has x's
/// order of dimensions in memory.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

/// silu(gate) * up, each rounded to their dtype. Equally shaped.
at::Tensor silu_multiply(const at::Tensor& gate, const at::Tensor& up);

}  // namespace stbllm
