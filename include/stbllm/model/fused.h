#pragma once
// Operations that take libtorch several calls and as many passes over memory, each in one pass: a generated
// token of a small model spends more time between its products than in them, and so does a step of training.
// They run on the CPU, under autograd too; elsewhere DecoderBlock composes them from libtorch's operations,
// which is also what tests compare them with.

#include <ATen/core/Tensor.h>

namespace stbllm {

/// Whether the functions below and causal_attention() take x: a float32 or bfloat16 tensor on the CPU whose
/// last dimension is adjacent in memory.
bool can_fuse(const at::Tensor& x);

/// Whether somebody records the gradients of x, which may be undefined.
bool records_gradients(const at::Tensor& x);

/// HF's RMS norm over the last dimension: statistics in float32, rounded to x's dtype before `weight` (width,
/// x's dtype, or undefined) is applied.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

/// Layer norm over the last dimension in float32, rounded to x's dtype once. `weight` and `bias` (width, x's
/// dtype) may be undefined. Without autograd.
at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);

/// HF's rotary positions, x * cos + rotate_half(x) * sin, rounded to x's dtype after every operation as
/// there. x (batch, heads, tokens, head_dim); cos and sin (tokens, head_dim) in x's dtype, both halves of a
/// row alike. The result has x's order of dimensions in memory.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin);

/// silu(gate) * up of two tensors of one shape and dtype, to which both operations round.
at::Tensor silu_multiply(const at::Tensor& gate, const at::Tensor& up);

/// KL(softmax(teacher) || softmax(student)) of each row of logits (rows, vocab), float32 (rows). `gradient`,
/// where it is not null, becomes the derivative with respect to the student's logits, softmax(student) -
/// softmax(teacher), in their dtype. Sums are float32. On any device, and without autograd.
at::Tensor softmax_divergence(const at::Tensor& teacher, const at::Tensor& student, at::Tensor* gradient);

}  // namespace stbllm
