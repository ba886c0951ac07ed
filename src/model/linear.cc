#include "stbllm/model/linear.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <string>

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

}  // namespace

ActivationView view_of(const at::Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  return {tensor.data_ptr(), element_type(tensor.scalar_type()), tensor.numel() / width, width};
}

at::Device device_of(const Backend& backend) { return at::Device(std::string(backend.device())); }

void* stream_of(const at::Tensor& x) {
  if (x.is_cpu()) return nullptr;
  return c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle();
}

at::ScalarType fast_product_dtype(at::Device device) {
  return !device.is_cpu() || multiplies_bfloat16_fast() ? at::kBFloat16 : at::kFloat;
}

DenseLinear::DenseLinear(at::Tensor weight, at::Tensor bias)
    : weight_(std::move(weight)), bias_(std::move(bias)), product_(weight_) {}

DenseLinear::DenseLinear(at::Tensor weight, at::Tensor bias, at::ScalarType product_dtype)
    : weight_(std::move(weight)), bias_(std::move(bias)), product_(weight_.to(product_dtype)) {}

at::Tensor DenseLinear::forward(const at::Tensor& x) const {
  const at::ScalarType dtype = product_dtype();
  if (x.scalar_type() == dtype) return at::linear(x, product_, bias_.defined() ? bias_.to(dtype) : bias_);
  const at::Tensor y = at::linear(x.to(dtype), product_).to(x.scalar_type());
  return bias_.defined() ? y + bias_ : y;
}

int64_t DenseLinear::bytes() const {
  return tensor_bytes(weight_) + tensor_bytes(bias_) +
         (product_.is_same(weight_) ? 0 : tensor_bytes(product_));
}

at::ScalarType DenseLinear::product_dtype() const { return product_.scalar_type(); }

PackedLinear::PackedLinear(const Backend& backend, const StructuredBinaryMatrix& matrix, at::Tensor bias)
    : backend_(backend),
      matrix_(backend.prepare(matrix)),
      rows_(matrix.layout().rows),
      cols_(matrix.layout().cols),
      bias_(std::move(bias)) {}

at::Tensor PackedLinear::forward(const at::Tensor& x) const {
  const Linear* const self = this;
  return forward_all({&self, 1}, x)[0];
}

std::vector<at::Tensor> forward_all(std::span<const Linear* const> linears, const at::Tensor& x) {
  std::vector<at::Tensor> outputs;
  std::vector<const PackedLinear*> packed;
  for (const Linear* linear : linears) packed.push_back(dynamic_cast<const PackedLinear*>(linear));
  if (std::ranges::find(packed, nullptr) != packed.end()) {
    for (const Linear* linear : linears) outputs.push_back(linear->forward(x));
    return outputs;
  }
  const at::Tensor input = x.contiguous();
  std::vector<int64_t> shape = x.sizes().vec();
  std::vector<Product> products;
  for (const PackedLinear* linear : packed) {
    STBLLM_CHECK(x.size(-1) == linear->cols_, "input width {}, matrix has {} columns", x.size(-1),
                 linear->cols_);
    STBLLM_CHECK(&linear->backend_ == &packed[0]->backend_, "linears of {} and {}", linear->backend_.name(),
                 packed[0]->backend_.name());
    shape.back() = linear->rows_;
    outputs.push_back(at::empty(shape, x.options()));
    products.push_back({linear->matrix_.get(), view_of(outputs.back())});
  }
  packed[0]->backend_.matmul_all(products, view_of(input), stream_of(x));
  for (size_t i = 0; i < packed.size(); ++i)
    if (packed[i]->bias_.defined()) outputs[i].add_(packed[i]->bias_);
  return outputs;
}

int64_t PackedLinear::bytes() const { return matrix_->bytes() + tensor_bytes(bias_); }

}  // namespace stbllm
