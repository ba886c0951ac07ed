#include "write_model.h"

#include <ATen/ATen.h>

#include "stbllm/base/interrupt.h"
#include "stbllm/base/profile.h"
#include "stbllm/run/tables.h"

namespace stbllm {

void write_model(ModelWriter& writer, const Assembly& assembly) {
  const StageTimer timer("pack");
  const auto& [checkpoint, spec, tables, quantized_blocks, quantized] = assembly;
  std::map<std::string, at::Tensor> tuned;
  for (int64_t i = 0; i < spec.layers; ++i) {
    check_interrupt();
    if (i < quantized_blocks) {
      const QuantizedBlock block = quantized(i);
      for (const LinearSpec& linear : spec.linears(i))
        writer.add_linear(linear.name, block.linears.at(linear.name));
      tuned.insert(block.tensors.begin(), block.tensors.end());
    } else {
      for (const LinearSpec& linear : spec.linears(i)) {
        const TensorSpec weight = linear.weight();
        writer.add_tensor(weight.name, checkpoint.load(weight.name, weight.shape), RowCoding::kKeep);
        checkpoint.release(weight.name);
      }
    }
  }
  for (const TensorSpec& tensor : spec.other_tensors()) {
    if (const QuantizedRows* rows = tables.integers(tensor.name)) {
      writer.add_rows(tensor.name, *rows);
      continue;
    }
    const auto found = tuned.find(tensor.name);
    writer.add_tensor(tensor.name,
                      found != tuned.end() ? found->second : checkpoint.load(tensor.name, tensor.shape),
                      tables.coding(tensor));
    checkpoint.release(tensor.name);
  }
}

}  // namespace stbllm
