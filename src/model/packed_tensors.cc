#include "stbllm/model/packed_tensors.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include "stbllm/base/error.h"
#include "stbllm/checkpoint/sources.h"
#include "stbllm/model/table.h"

namespace stbllm {

PackedTensors::PackedTensors(const PackedReader& packed)
    : packed_(packed), path_(packed.file()->file()->path().string()) {}

const StructuredBinaryMatrix* PackedTensors::find_linear(const LinearSpec& linear) const {
  const auto found = packed_.linears().find(linear.name);
  if (found == packed_.linears().end()) return nullptr;
  const Layout& layout = found->second.layout();
  if (layout.rows != linear.rows || layout.cols != linear.cols)
    fail(ErrorCode::kMismatch, "{}: linear {} is {} x {}, but the configuration asks for {} x {}", path_,
         linear.name, layout.rows, layout.cols, linear.rows, linear.cols);
  return &found->second;
}

const QuantizedRows* PackedTensors::find_rows(const TensorSpec& tensor) const {
  const auto rows = packed_.quantized_rows().find(tensor.name.substr(0, tensor.name.rfind('.')));
  if (!tensor.name.ends_with(".weight") || rows == packed_.quantized_rows().end()) return nullptr;
  check_shape(tensor, {rows->second.layout().rows, rows->second.layout().cols});
  return &rows->second;
}

at::Tensor PackedTensors::load(const TensorSpec& tensor) const {
  if (const QuantizedRows* rows = find_rows(tensor)) return dense_rows(*rows);
  if (!packed_.has_dense(tensor.name))
    fail(ErrorCode::kMismatch, "{}: tensor {} is missing; the model's configuration needs it", path_,
         tensor.name);
  const TensorEntry& entry = packed_.dense(tensor.name);
  check_shape(tensor, entry.shape);
  void* data = const_cast<std::byte*>(entry.data.data());  // from_blob knows no const; nobody writes to it
  return at::from_blob(data, entry.shape, scalar_type_of(entry.dtype, path_, tensor.name));
}

void PackedTensors::check_shape(const TensorSpec& tensor, const std::vector<int64_t>& found) const {
  if (found != tensor.shape)
    fail(ErrorCode::kMismatch, "{}: tensor {} has shape [{}], but the configuration asks for [{}]", path_,
         tensor.name, fmt::join(found, ", "), fmt::join(tensor.shape, ", "));
}

}  // namespace stbllm
