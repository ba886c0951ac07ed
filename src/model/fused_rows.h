#pragma once
// The passes of fused.h over rows in memory, for those who share them among threads themselves. T is float,
// or uint16_t where elements are bfloat16.

#include <cstdint>

namespace stbllm {

/// y = the norm of x, which may be y, times weight, plus bias, which only layer norms have.
template <typename T>
struct NormRows {
  const T* x;       // (rows, width)
  const T* weight;  // (width) or null
  const T* bias;    // (width) or null
  T* y;             // (rows, width)
  int64_t width;
  float eps;
};
template <typename T>
void rms_norm_rows(const NormRows<T>& rows, int64_t begin, int64_t end);
template <typename T>
void layer_norm_rows(const NormRows<T>& rows, int64_t begin, int64_t end);

/// A row is one head of one token. Rows are counted by head, then token, then sequence, as projections leave
/// them in memory.
template <typename T>
struct RotateRows {
  const T* x;
  T* y;
  const T *cos, *sin;  // (tokens, width)
  int64_t heads, tokens, width;
  int64_t batch_stride, head_stride, token_stride;  // of x and of y
};
template <typename T>
void rotate_rows(const RotateRows<T>& rows, int64_t begin, int64_t end);

/// y = silu(gate) * up
template <typename T>
struct Gates {
  const T* gate;
  const T* up;
  T* y;
};
template <typename T>
void multiply_gates(const Gates<T>& gates, int64_t begin, int64_t end);

/// x = relu(x), which keeps what is not a number.
template <typename T>
void rectify(T* x, int64_t begin, int64_t end);

/// y += x, rounded to what an element holds.
template <typename T>
void add_elements(const T* x, T* y, int64_t begin, int64_t end);

}  // namespace stbllm
