#pragma once
// The table (vocab, width) at an end of a model, one row per token: the embedding looks rows up, the head
// multiplies by all of them. A table is dense (a tensor) or quantized rows, which is what a packed file calls
// its form of small integers and scales (pack/quantized_rows.h).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "stbllm/backend/backend.h"

namespace stbllm {

/// The weights (rows, cols) that quantized rows stand for, float32.
at::Tensor dense_rows(const QuantizedRows& rows);

class Table {
 public:
  Table() = default;
  explicit Table(at::Tensor dense) : dense_(std::move(dense)) {}
  /// Quantized rows are never widened as a whole: the head of a small model is most of what a generated token
  /// reads. `prepared` holds the same rows, from prepare_rows() of `backend`, which must outlive this.
  Table(QuantizedRows rows, const Backend& backend, std::unique_ptr<PreparedMatrix> prepared)
      : rows_(std::move(rows)), backend_(&backend), prepared_(std::move(prepared)) {}

  /// ids of any shape, int32 or int64, best on the CPU -> the rows (ids..., width) on `device`, which is the
  /// table's; of quantized rows in `dtype` and of a dense table in its own dtype. An id outside the table is
  /// a logic error.
  at::Tensor look_up(const at::Tensor& ids, at::ScalarType dtype, at::Device device = at::kCPU) const;
  /// x (..., width) -> (..., vocab). A dense table gives x's dtype; quantized rows give float32, as the
  /// backend multiplies, and no gradients.
  at::Tensor multiply(const at::Tensor& x) const;
  /// (vocab, width); undefined where the table is quantized rows.
  const at::Tensor& dense() const { return dense_; }
  int64_t bytes() const;  ///< of memory

 private:
  at::Tensor dense_;
  QuantizedRows rows_;
  const Backend* backend_ = nullptr;
  std::shared_ptr<const PreparedMatrix> prepared_;  // from rows_; null where the table is dense
};

}  // namespace stbllm
