#pragma once
// Causal softmax attention on the CPU; elsewhere DecoderBlock calls libtorch's. A query
// passes its keys a few at a time with a running maximum (FlashAttention, arXiv:2205.14135), so that no
// matrix of scores is ever written. Several queries are cut into tiles; the keys of a single one are cut into
// parts whose results are merged (split-K, as Flash-Decoding does).

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace stbllm {

/// queries (batch, heads, tokens, head_dim), keys and values (batch, kv_heads, first + tokens, head_dim), all
/// as can_fuse() takes them and of one dtype -> (batch, tokens, heads * head_dim) in that dtype. Query i
/// stands at position first + i and sees the keys up to its own, of them only the last `window` where that is
/// above 0. heads / kv_heads neighbours share keys and values. float32 throughout, scores times
/// head_dim^-0.5. The same bytes for any number of threads. A value that is not finite
/// shows in every query of a tile (64 neighbours) of which one sees it. Autograd flows through where first is
/// 0.
at::Tensor causal_attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                            int64_t first, int64_t window);

}  // namespace stbllm
