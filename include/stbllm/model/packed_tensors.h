#pragma once
// The tensors of a packed file by what a model asks for, each compared with the shape that the model's
// configuration gives it.

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "stbllm/model/model_spec.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {

/// All of these throw Error(kMismatch) where the file has the tensor in another shape. The reader outlives
/// this object and what it returns.
class PackedTensors {
 public:
  explicit PackedTensors(const PackedReader& packed);

  /// Null unless the weight of the linear is packed.
  const StructuredBinaryMatrix* find_linear(const LinearSpec& linear) const;
  /// Null unless the tensor is stored as quantized rows, which the file lists under its name without
  /// ".weight".
  const QuantizedRows* find_rows(const TensorSpec& tensor) const;
  /// A view of the mapped file where the tensor is dense; quantized rows are widened to float32. Throws
  /// Error(kMismatch) for a tensor that is missing, Error(kUnsupported) for a dtype that is no float.
  at::Tensor load(const TensorSpec& tensor) const;

 private:
  void check_shape(const TensorSpec& tensor, const std::vector<int64_t>& found) const;

  const PackedReader& packed_;
  std::string path_;
};

}  // namespace stbllm
