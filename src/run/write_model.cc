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
    const QuantizedBlock block = i < quantized_blocks ? quantized(i) : QuantizedBlock{};
    for (const LinearSpec& linear : spec.linears(i)) {
      if (const auto found = block.linears.find(linear.name); found != block.linears.end()) {
        writer.add_linear(linear.name, found->second);
        continue;
      }
      const TensorSpec weight = linear.weight();
      writer.add_tensor(weight.name, checkpoint.load(weight.name, weight.shape), RowCoding::kKeep);
      checkpoint.release(weight.name);
    }
    tuned.insert(block.tensors.begin(), block.tensors.end());
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
