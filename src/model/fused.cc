#include "stbllm/model/fused.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "elements.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

/// Elements that are worth a second thread.
constexpr int64_t kGrain = 1 << 14;

template <typename T>
struct NormRows {
  const T* x;       // (rows, width)
  const T* weight;  // (width) or null
  T* y;             // (rows, width)
  int64_t width;
  float eps;
};
template <typename T>
STBLLM_INLINE void norm_rows_of(const NormRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = rows.x + row * rows.width;
    T* y = rows.y + row * rows.width;
    Lanes squares = {};
    for_each_lanes(
        0, rows.width, [&](int64_t at, int count) __attribute__((always_inline)) {
          const Lanes v = load(x + at, count);
          squares += v * v;
        });
    const float scale = 1 / std::sqrt(sum_of(squares) / static_cast<float>(rows.width) + rows.eps);
    for_each_lanes(
        0, rows.width, [&](int64_t at, int count) __attribute__((always_inline)) {
          Lanes v = rounded<T>(load(x + at, count) * scale);
          if (rows.weight != nullptr) v = rounded<T>(v * load(rows.weight + at, count));
          store(y + at, v, count);
        });
  }
}
STBLLM_CLONES void norm_rows(const NormRows<float>& rows, int64_t begin, int64_t end) {
  norm_rows_of(rows, begin, end);
}
STBLLM_CLONES void norm_rows(const NormRows<uint16_t>& rows, int64_t begin, int64_t end) {
  norm_rows_of(rows, begin, end);
}

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
STBLLM_INLINE void rotate_rows_of(const RotateRows<T>& rows, int64_t begin, int64_t end) {
  const int64_t half = rows.width / 2;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row % rows.heads, token = row / rows.heads % rows.tokens,
                  batch = row / rows.heads / rows.tokens;
    const int64_t offset = batch * rows.batch_stride + head * rows.head_stride + token * rows.token_stride;
    const T *x = rows.x + offset, *cos = rows.cos + token * rows.width, *sin = rows.sin + token * rows.width;
    T* y = rows.y + offset;
    for_each_lanes(
        0, half, [&](int64_t at, int count) __attribute__((always_inline)) {
          const Lanes low = load(x + at, count), high = load(x + half + at, count);
          const auto turned = [&](Lanes straight, Lanes crossed, int64_t column)
              __attribute__((always_inline)) {
            return rounded<T>(rounded<T>(straight * load(cos + column, count)) +
                              rounded<T>(crossed * load(sin + column, count)));
          };
          store(y + at, turned(low, -high, at), count);
          store(y + half + at, turned(high, low, half + at), count);
        });
  }
}
STBLLM_CLONES void rotate_rows(const RotateRows<float>& rows, int64_t begin, int64_t end) {
  rotate_rows_of(rows, begin, end);
}
STBLLM_CLONES void rotate_rows(const RotateRows<uint16_t>& rows, int64_t begin, int64_t end) {
  rotate_rows_of(rows, begin, end);
}

template <typename T>
struct Gates {
  const T* gate;
  const T* up;
  T* y;
};
template <typename T>
STBLLM_INLINE void multiply_gates_of(const Gates<T>& gates, int64_t begin, int64_t end) {
  for_each_lanes(
      begin, end, [&](int64_t at, int count) __attribute__((always_inline)) {
        const Lanes x = load(gates.gate + at, count);
        store(gates.y + at, rounded<T>(rounded<T>(x / (1 + exp_of(-x))) * load(gates.up + at, count)), count);
      });
}
STBLLM_CLONES void multiply_gates(const Gates<float>& gates, int64_t begin, int64_t end) {
  multiply_gates_of(gates, begin, end);
}
STBLLM_CLONES void multiply_gates(const Gates<uint16_t>& gates, int64_t begin, int64_t end) {
  multiply_gates_of(gates, begin, end);
}

template <typename T>
const T* elements(const at::Tensor& x) {
  return x.defined() ? static_cast<const T*>(x.const_data_ptr()) : nullptr;
}

template <typename T>
at::Tensor rms_norm_of(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor input = x.contiguous(), output = at::empty_like(input);
  const int64_t width = x.size(-1);
  const NormRows<T> rows{.x = elements<T>(input),
                         .weight = elements<T>(weight),
                         .y = static_cast<T*>(output.data_ptr()),
                         .width = width,
                         .eps = static_cast<float>(eps)};
  at::parallel_for(0, x.numel() / width, std::max<int64_t>(1, kGrain / width),
                   [&](int64_t begin, int64_t end) { norm_rows(rows, begin, end); });
  return output;
}

template <typename T>
at::Tensor rotate_of(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor output = at::empty_strided(x.sizes(), x.strides(), x.options());
  const int64_t width = x.size(3);
  const RotateRows<T> rows{.x = elements<T>(x),
                           .y = static_cast<T*>(output.data_ptr()),
                           .cos = elements<T>(cos),
                           .sin = elements<T>(sin),
                           .heads = x.size(1),
                           .tokens = x.size(2),
                           .width = width,
                           .batch_stride = x.stride(0),
                           .head_stride = x.stride(1),
                           .token_stride = x.stride(2)};
  at::parallel_for(0, x.numel() / width, std::max<int64_t>(1, kGrain / width),
                   [&](int64_t begin, int64_t end) { rotate_rows(rows, begin, end); });
  return output;
}

template <typename T>
at::Tensor silu_multiply_of(const at::Tensor& gate, const at::Tensor& up) {
  const at::Tensor gate_rows = gate.contiguous(), up_rows = up.contiguous(),
                   output = at::empty_like(gate_rows);
  const Gates<T> gates{
      .gate = elements<T>(gate_rows), .up = elements<T>(up_rows), .y = static_cast<T*>(output.data_ptr())};
  at::parallel_for(0, gate.numel(), kGrain,
                   [&](int64_t begin, int64_t end) { multiply_gates(gates, begin, end); });
  return output;
}

}  // namespace

bool can_fuse(const at::Tensor& x) {
  return x.is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16) &&
         x.stride(-1) == 1 && !at::GradMode::is_enabled();
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  STBLLM_CHECK(!weight.defined() || (weight.scalar_type() == x.scalar_type() && weight.is_contiguous() &&
                                     weight.numel() == x.size(-1)),
               "the weight of a norm of {}", x.size(-1));
  return x.scalar_type() == at::kFloat ? rms_norm_of<float>(x, weight, eps)
                                       : rms_norm_of<uint16_t>(x, weight, eps);
}

at::Tensor silu_multiply(const at::Tensor& gate, const at::Tensor& up) {
  STBLLM_CHECK(gate.sizes() == up.sizes() && gate.scalar_type() == up.scalar_type(),
               "a gate of {} elements for {}", gate.numel(), up.numel());
  return gate.scalar_type() == at::kFloat ? silu_multiply_of<float>(gate, up)
                                          : silu_multiply_of<uint16_t>(gate, up);
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  for (const at::Tensor& table : {cos, sin})
    STBLLM_CHECK(table.is_contiguous() && table.scalar_type() == x.scalar_type() &&
                     table.size(0) == x.size(2) && table.size(1) == x.size(3) && x.size(3) % 2 == 0,
                 "rotary tables of {} positions for {} tokens of width {}", table.size(0), x.size(2),
                 x.size(3));
  return x.scalar_type() == at::kFloat ? rotate_of<float>(x, cos, sin) : rotate_of<uint16_t>(x, cos, sin);
}

}  // namespace stbllm
