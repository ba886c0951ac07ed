#include <ATen/ATen.h>

#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/checkpoint/sources.h"
#include "stbllm/run/assemble.h"
#include "stbllm/run/tables.h"
#include "write_model.h"

namespace stbllm {
namespace {

class PackedModelWriter : public ModelWriter {
 public:
  explicit PackedModelWriter(PackedWriter& file) : file_(file) {}
  void add_linear(const std::string& name, const BinarizedWeight& weight) override {
    file_.add_linear(name, pack_weight(weight, name));
  }
  void add_rows(const std::string& name, const QuantizedRows& rows) override {
    file_.add_quantized_rows(name.substr(0, name.rfind('.')),
                             rows);  // without ".weight", as linears are named
  }
  void add_tensor(const std::string& name, const at::Tensor& tensor, RowCoding coding) override {
    const at::Tensor stored = (coding == RowCoding::kFloat16 ? tensor.to(at::kHalf) : tensor).contiguous();
    file_.add_dense(name, dtype_name(stored), stored.sizes().vec(), bytes_of(stored));
  }

 private:
  PackedWriter& file_;
};

}  // namespace

void write_packed(PackedWriter& file, const Assembly& assembly) {
  PackedModelWriter writer(file);
  write_model(writer, assembly);
}

}  // namespace stbllm
