#include "stbllm/model/linear.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "stbllm/base/cpu.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

int64_t tensor_bytes(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0;
}

ElementType element_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return ElementType::kFloat32;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kHalf:
      return ElementType::kFloat16;
    default:
      break;
  }
  STBLLM_CHECK(false, "activations of dtype {}", at::toString(dtype));
}

/// (..., width) as (tokens, width).
ActivationView view_of(const at::Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  return {tensor.data_ptr(), element_type(tensor.scalar_type()), tensor.numel() / width, width};
}

}  // namespace

at::ScalarType fast_product_dtype(at::Device device) {
  return device.is_cuda() || multiplies_bfloat16_fast() ? at::kBFloat16 : at::kFloat;
}

DenseLinear::DenseLinear(at::Tensor weight, at::Tensor bias)
    : weight_(std::move(weight)), bias_(std::move(bias)), product_(weight_) {}

DenseLinear::DenseLinear(at::Tensor weight, at::Tensor bias, at::ScalarType product_dtype)
    : weight_(std::move(weight)), bias_(std::move(bias)), product_(weight_.to(product_dtype)) {}

at::Tensor DenseLinear::forward(const at::Tensor& x) const {
  const at::ScalarType dtype = product_dtype();
  if (x.scalar_type() == dtype) return at::linear(x, product_, bias_);
  const at::Tensor y = at::linear(x.to(dtype), product_).to(x.scalar_type());
  return bias_.defined() ? y + bias_ : y;
}

int64_t DenseLinear::bytes() const {
  return tensor_bytes(weight_) + tensor_bytes(bias_) + (product_.is_same(weight_) ? 0 : tensor_bytes(product_));
}

at::ScalarType DenseLinear::product_dtype() const { return product_.scalar_type(); }

PackedLinear::PackedLinear(const Backend& backend, const StructuredBinaryMatrix& matrix, at::Tensor bias)
    : backend_(backend),
      matrix_(backend.prepare(matrix)),
      rows_(matrix.layout().rows),
      cols_(matrix.layout().cols),
      bias_(std::move(bias)) {}

at::Tensor PackedLinear::forward(const at::Tensor& x) const {
  STBLLM_CHECK(x.size(-1) == cols_, "input width {}, matrix has {} columns", x.size(-1), cols_);
  const at::Tensor input = x.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows_;
  const at::Tensor output = at::empty(shape, x.options());
  void* stream = nullptr;
  if (x.is_cuda()) stream = c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
  backend_.matmul(*matrix_, view_of(input), view_of(output), stream);
  return bias_.defined() ? output.add_(bias_) : output;
}

int64_t PackedLinear::bytes() const { return matrix_->bytes() + tensor_bytes(bias_); }

}  // namespace stbllm
