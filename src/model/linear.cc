#include "stbllm/model/linear.h"

#include <ATen/ATen.h>

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

DenseLinear::DenseLinear(at::Tensor weight, at::Tensor bias)
    : weight_(std::move(weight)), bias_(std::move(bias)) {}

at::Tensor DenseLinear::forward(const at::Tensor& x) const { return at::linear(x, weight_, bias_); }

int64_t DenseLinear::bytes() const { return tensor_bytes(weight_) + tensor_bytes(bias_); }

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
  backend_.matmul(*matrix_, view_of(input), view_of(output));
  return bias_.defined() ? output.add_(bias_) : output;
}

int64_t PackedLinear::bytes() const { return matrix_->bytes() + tensor_bytes(bias_); }

}  // namespace stbllm
