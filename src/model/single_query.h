#pragma once
// Attention of one token, for a team of threads that exists already.

#include <cstdint>

#include "stbllm/base/parallel.h"

namespace stbllm {

/// One query of every head of a single sequence, in bfloat16, at `position`. It sees the keys up to its own,
/// of them only the last `window` where that is above 0.
struct SingleQuery {
  const uint16_t* queries = nullptr;  ///< (heads, dim)
  const uint16_t* keys = nullptr;     ///< (kv_heads, tokens, dim), heads head_stride apart
  const uint16_t* values = nullptr;   ///< like the keys
  uint16_t* out = nullptr;            ///< (heads, dim)
  int64_t heads = 0, kv_heads = 0, dim = 0, head_stride = 0, position = 0, window = 0;
};

/// Floats of memory that attend_single_query() takes.
int64_t single_query_floats(const SingleQuery& query);
/// causal_attention() by all threads of the team, which call this together and wait for all before it and
/// behind it.
void attend_single_query(const SingleQuery& query, float* memory, const TeamPlace& team);

}  // namespace stbllm
