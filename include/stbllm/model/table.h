#pragma once
// The table (vocab, width) at an end of a model: the embedding looks rows up, the head multiplies by all of
// them.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "stbllm/backend/backend.h"

namespace stbllm {

class Table {
 public:
  Table() = default;
  explicit Table(at::Tensor dense) : dense_(std::move(dense)) {}
  /// Rows of integers stay what they are: the head of a small model is most of what a generated token reads.
  /// `prepared` are the same rows from prepare_rows() of `backend`, which must outlive this.
  Table(QuantizedRows rows, const Backend& backend, std::unique_ptr<PreparedMatrix> prepared)
      : rows_(std::move(rows)), backend_(&backend), prepared_(std::move(prepared)) {}

  /// ids, any shape, int32 or int64 on the table's device -> (ids.., width) in `dtype`, which is the table's
  /// if dense.
  at::Tensor look_up(const at::Tensor& ids, at::ScalarType dtype) const;
  /// x (.., width) -> (.., vocab): in x's dtype if dense, else float32 as the backend multiplies, without
  /// autograd.
  at::Tensor multiply(const at::Tensor& x) const;
  /// (vocab, width); undefined where the table is rows of integers.
  const at::Tensor& dense() const { return dense_; }
  int64_t bytes() const;

 private:
  at::Tensor dense_;
  QuantizedRows rows_;
  const Backend* backend_ = nullptr;
  std::shared_ptr<const PreparedMatrix> prepared_;  // rows_
};

}  // namespace stbllm
