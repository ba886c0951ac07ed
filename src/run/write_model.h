#pragma once
// All tensors of a quantized model, in the order of the checkpoint's blocks, into whatever container takes
// them.

#include <string>

#include "stbllm/run/assemble.h"

namespace stbllm {

class ModelWriter {
 public:
  virtual ~ModelWriter() = default;
  virtual void add_linear(const std::string& name, const BinarizedWeight& weight) = 0;
  virtual void add_rows(const std::string& name, const QuantizedRows& rows) = 0;
  /// Of floating-point numbers, as kKeep or kFloat16 says.
  virtual void add_tensor(const std::string& name, const at::Tensor& tensor, RowCoding coding) = 0;
};

void write_model(ModelWriter& writer, const Assembly& assembly);

}  // namespace stbllm
