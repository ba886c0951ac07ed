#include <ATen/ATen.h>

#include "stbllm/base/text_file.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/checkpoint/checkpoint_writer.h"
#include "stbllm/checkpoint/sources.h"
#include "stbllm/run/assemble.h"
#include "stbllm/run/tables.h"
#include "write_model.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

class DenseModelWriter : public ModelWriter {
 public:
  explicit DenseModelWriter(CheckpointWriter& checkpoint) : checkpoint_(checkpoint) {}
  void add_linear(const std::string& name, const BinarizedWeight& weight) override {
    add_tensor(name + ".weight", weight.to_dense(), RowCoding::kKeep);
  }
  void add_rows(const std::string& name, const QuantizedRows& rows) override {
    add_tensor(name, dense_rows(rows), RowCoding::kKeep);
  }
  void add_tensor(const std::string& name, const at::Tensor& tensor, RowCoding coding) override {
    const at::Tensor stored = stored_floats(tensor, coding).contiguous();
    checkpoint_.add(name, dtype_name(stored), stored.sizes().vec(), bytes_of(stored));
  }

 private:
  CheckpointWriter& checkpoint_;
};

/// The tokenizer of a checkpoint is in such files, and what else belongs to it beside its configuration.
bool goes_along(const std::string& name) {
  return (name.ends_with(".json") && !name.ends_with(".index.json") && name != "config.json") ||
         name == "tokenizer.model" || name == "merges.txt";
}

}  // namespace

void export_dense(const fs::path& output, const Assembly& assembly) {
  CheckpointWriter written(output);
  DenseModelWriter writer(written);
  write_model(writer, assembly);
  for (const auto& entry : fs::directory_iterator(assembly.checkpoint.directory())) {
    const std::string name = entry.path().filename().string();
    if (goes_along(name)) written.add_file(name, read_text(entry.path()));
  }
  written.add_config(assembly.checkpoint.config(), "float32");
  written.commit();
}

}  // namespace stbllm
