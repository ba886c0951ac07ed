#pragma once
// A linear layer y = x W^T + b. W is a tensor (DenseLinear) or packed planes (PackedLinear).

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

/// The dtype with the range of float32 in which a device multiplies fastest: bfloat16 where it has
/// instructions for it, which every GPU is assumed to have, else float32.
at::ScalarType fast_product_dtype(at::Device device = at::kCPU);

/// A contiguous tensor (..., width) of float32, bfloat16 or float16 as what a backend takes: (tokens, width).
ActivationView view_of(const at::Tensor& tensor);
/// The stream in which operations on x are queued, for a backend; null on the CPU.
void* stream_of(const at::Tensor& x);
/// Where a backend's activations live.
at::Device device_of(const Backend& backend);

/// Autograd flows through weight, bias and x.
class DenseLinear : public Linear {
 public:
  /// weight (rows, cols); bias (rows) or undefined. Products run in `product_dtype`, from a copy of weight,
  /// or without it in weight's own dtype. x is cast to that dtype and the result is cast back.
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
  at::Tensor product_;  // weight_ in product_dtype(); the same tensor where that is its own dtype
};

/// A backend multiplies straight from the packed bits. x is float32 or bfloat16 on the backend's device.
/// There are no gradients.
class PackedLinear : public Linear {
 public:
  /// bias (rows) or undefined, in the dtype of the activations. `backend` must outlive this.
  PackedLinear(const Backend& backend, const StructuredBinaryMatrix& matrix, at::Tensor bias);
  at::Tensor forward(const at::Tensor& x) const override;
  int64_t bytes() const override;
  const PreparedMatrix& matrix() const { return *matrix_; }
  const at::Tensor& bias() const { return bias_; }

 private:
  friend std::vector<at::Tensor> forward_all(std::span<const Linear* const> linears, const at::Tensor& x);

  const Backend& backend_;
  std::unique_ptr<PreparedMatrix> matrix_;
  int64_t rows_;
  int64_t cols_;
  at::Tensor bias_;
};

/// What each of the linears makes of x. Where all of them are packed, the backend gets them in one call, so
/// that its threads start once.
std::vector<at::Tensor> forward_all(std::span<const Linear* const> linears, const at::Tensor& x);

}  // namespace stbllm
