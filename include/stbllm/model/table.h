#pragma once
// The table (vocab, width) at an end of a model: the embedding looks rows up, the head multiplies by all of them.

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "stbllm/pack/quantized_rows.h"

namespace stbllm {

class Table {
 public:
  Table() = default;
  explicit Table(at::Tensor dense) : dense_(std::move(dense)) {}
  /// Rows of integers stay what they are, on the CPU: the head of a small model is most of what a generated token reads.
  explicit Table(QuantizedRows rows);

  /// ids, any shape, int32 or int64 on the table's device -> (ids.., width) in `dtype`, which is the table's if dense.
  at::Tensor look_up(const at::Tensor& ids, at::ScalarType dtype) const;
  /// x (.., width) -> (.., vocab): in x's dtype if dense. Else float32, without autograd; of many tokens in bfloat16 it has the
  /// precision of fast_product_dtype(). A result does not depend on the number of threads.
  at::Tensor multiply(const at::Tensor& x) const;
  /// (vocab, width); undefined where the table is rows of integers.
  const at::Tensor& dense() const { return dense_; }
  int64_t bytes() const;

 private:
  at::Tensor multiply_few(const at::Tensor& x) const;
  at::Tensor multiply_many(const at::Tensor& x, at::ScalarType product_dtype) const;

  at::Tensor dense_;
  QuantizedRows rows_;
  at::Tensor scales_;  // of rows_, float32 (rows, column blocks)
};

}  // namespace stbllm
