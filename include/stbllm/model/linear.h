#pragma once
// y = x W^T + b, with W as a tensor or as packed planes.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "stbllm/backend/backend.h"

namespace stbllm {

class Linear {
 public:
  virtual ~Linear() = default;
  /// x (..., cols) -> (..., rows), in x's dtype.
  virtual at::Tensor forward(const at::Tensor& x) const = 0;
  virtual int64_t bytes() const = 0;  ///< memory held by weight and bias
};

/// The dtype in which a device multiplies fastest at full range: bfloat16 where it has instructions for it
/// (taken for granted of a GPU), else float32.
at::ScalarType fast_product_dtype(at::Device device = at::kCPU);

/// A contiguous tensor (..., width) as a backend's (tokens, width): float32, bfloat16 or float16.
ActivationView view_of(const at::Tensor& tensor);

/// Autograd flows through weight, bias and x.
class DenseLinear : public Linear {
 public:
  /// weight (rows, cols); bias (rows) in the dtype of the activations, or undefined. Products run in weight's
  /// dtype, or in `product_dtype` (from a copy of weight); x is cast to it and the result back.
  DenseLinear(at::Tensor weight, at::Tensor bias);
  DenseLinear(at::Tensor weight, at::Tensor bias, at::ScalarType product_dtype);
  at::Tensor forward(const at::Tensor& x) const override;
  int64_t bytes() const override;
  const at::Tensor& weight() const { return weight_; }
  const at::Tensor& bias() const { return bias_; }
  at::ScalarType product_dtype() const;

 private:
  at::Tensor weight_;
  at::Tensor bias_;
  at::Tensor product_;  // weight_ in the dtype of products
};

/// Multiplies by a backend straight from the packed bits. x is float32 or bfloat16 on the backend's device.
/// No autograd.
class PackedLinear : public Linear {
 public:
  /// bias (rows) or undefined, in the dtype of the activations. `backend` must outlive this.
  PackedLinear(const Backend& backend, const StructuredBinaryMatrix& matrix, at::Tensor bias);
  at::Tensor forward(const at::Tensor& x) const override;
  int64_t bytes() const override;

 private:
  friend std::vector<at::Tensor> forward_all(std::span<const Linear* const> linears, const at::Tensor& x);

  const Backend& backend_;
  std::unique_ptr<PreparedMatrix> matrix_;
  int64_t rows_;
  int64_t cols_;
  at::Tensor bias_;
};

/// linear(x) of each: in one go of the backend where all of them are packed.
std::vector<at::Tensor> forward_all(std::span<const Linear* const> linears, const at::Tensor& x);

}  // namespace stbllm
