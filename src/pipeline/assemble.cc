#include "stbllm/pipeline/assemble.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>

#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/profile.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/pipeline/pack_weight.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

/// Packed and dense logits differ by float32 rounding only, which deep models amplify.
constexpr double kLogitTolerance = 2e-3;

std::string_view dtype_name(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 ? "BF16" : tensor.scalar_type() == at::kHalf ? "F16" : "F32";
}

/// The packed form of a table of rows; `coding` is kInt8 or kInt4.
QuantizedRows encode_rows(const at::Tensor& table, RowCoding coding, const std::string& name) {
  const QuantizedRows::Layout layout{table.size(0), table.size(1), coding == RowCoding::kInt8 ? 8 : 4};
  const auto load = [&](int64_t row, float* out) {
    at::from_blob(out, {layout.cols}, at::kFloat).copy_(table[row]);
  };
  return QuantizedRows::encode(layout, load, name);
}

/// What a table (rows, cols) becomes by being stored, float32.
at::Tensor stored_table(const at::Tensor& table, RowCoding coding, const std::string& name) {
  if (coding == RowCoding::kKeep) return table;
  if (coding == RowCoding::kFloat16) return table.to(at::kHalf).to(at::kFloat);
  const QuantizedRows rows = encode_rows(table, coding, name);
  at::Tensor result = at::empty(table.sizes(), at::kFloat);
  at::parallel_for(0, table.size(0), 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      rows.decode_row(row, result.data_ptr<float>() + row * table.size(1));
  });
  return result;
}

/// Writes a model, whatever its container is.
class ModelWriter {
 public:
  virtual ~ModelWriter() = default;
  virtual void add_linear(const std::string& name, const BinarizedWeight& weight) = 0;
  virtual void add_tensor(const std::string& name, const at::Tensor& tensor, RowCoding coding) = 0;
};

class PackedModelWriter : public ModelWriter {
 public:
  explicit PackedModelWriter(PackedWriter& file) : file_(file) {}
  void add_linear(const std::string& name, const BinarizedWeight& weight) override {
    file_.add_linear(name, pack_weight(weight, name));
  }
  void add_tensor(const std::string& name, const at::Tensor& tensor, RowCoding coding) override {
    if (coding == RowCoding::kInt8 || coding == RowCoding::kInt4) {
      const std::string matrix = name.substr(0, name.rfind('.'));  // without ".weight", as linears are named
      file_.add_quantized_rows(matrix, encode_rows(tensor, coding, matrix));
      return;
    }
    const at::Tensor stored = (coding == RowCoding::kFloat16 ? tensor.to(at::kHalf) : tensor).contiguous();
    file_.add_dense(name, dtype_name(stored), stored.sizes().vec(), bytes_of(stored));
  }

 private:
  PackedWriter& file_;
};

class DenseModelWriter : public ModelWriter {
 public:
  explicit DenseModelWriter(SafetensorsWriter& file) : file_(file) {}
  void add_linear(const std::string& name, const BinarizedWeight& weight) override {
    add_tensor(name + ".weight", weight.to_dense(), RowCoding::kKeep);
  }
  void add_tensor(const std::string& name, const at::Tensor& tensor, RowCoding coding) override {
    const at::Tensor stored = stored_table(tensor, coding, name).contiguous();
    file_.add(name, dtype_name(stored), stored.sizes().vec(), bytes_of(stored));
  }

 private:
  SafetensorsWriter& file_;
};

void write_model(ModelWriter& writer, const Assembly& assembly) {
  const StageTimer timer("pack");
  const auto& [checkpoint, spec, recipe, quantized_blocks, quantized] = assembly;
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
    const auto found = tuned.find(tensor.name);
    writer.add_tensor(tensor.name,
                      found != tuned.end() ? found->second : checkpoint.load(tensor.name, tensor.shape),
                      row_coding(spec, recipe, tensor));
    checkpoint.release(tensor.name);
  }
}

}  // namespace

RowCoding row_coding(const ModelSpec& spec, const Recipe& recipe, const TensorSpec& tensor) {
  return tensor.name == spec.embedding().name ? recipe.embedding
         : tensor.name == spec.head().name    ? recipe.head
                                              : RowCoding::kKeep;
}

void store_tables(Decoder& decoder, const Recipe& recipe) {
  const ModelSpec& spec = decoder.spec();
  const auto stored = [&](const at::Tensor& table, RowCoding coding, const TensorSpec& tensor) {
    return stored_table(table.cpu(), coding, tensor.name).to(decoder.device());
  };
  const at::Tensor embedding = stored(decoder.embedding(), recipe.embedding, spec.embedding());
  decoder.set_tables(embedding,
                     spec.tied_head ? embedding : stored(decoder.head(), recipe.head, spec.head()));
}

void write_packed(PackedWriter& file, const Assembly& assembly) {
  PackedModelWriter writer(file);
  write_model(writer, assembly);
}

namespace {

/// What a reader of a checkpoint's directory may look for.
constexpr std::string_view kCheckpointFiles[] = {
    "config.json",       "generation_config.json",       "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tokenizer.json",    "tokenizer_config.json",
    "tokenizer.model",   "special_tokens_map.json",      "added_tokens.json", "vocab.json",
    "merges.txt"};

/// Renames, or copies and then renames where `to` is on another file system.
void move_file(const fs::path& from, const fs::path& to, std::error_code& error) {
  fs::rename(from, to, error);
  if (error != std::errc::cross_device_link) return;
  const fs::path part = to.string() + ".part";
  fs::copy_file(from, part, fs::copy_options::overwrite_existing, error);
  if (!error) fs::rename(part, to, error);
}

}  // namespace

void export_dense(const fs::path& output, const fs::path& scratch, const Assembly& assembly) {
  const Checkpoint& checkpoint = assembly.checkpoint;
  std::error_code error;
  const auto check = [&](const fs::path& path) {
    if (error)
      fail(ErrorCode::kWriteFailed, "{}: {}; check the path and the disk", path.string(), error.message());
  };
  fs::create_directories(scratch, error);
  check(scratch);
  SafetensorsWriter file(scratch / "model.safetensors", /*force=*/true);
  DenseModelWriter writer(file);
  write_model(writer, assembly);
  file.set_metadata("format", "pt");
  file.finish();
  file.commit();
  for (const auto& entry : fs::directory_iterator(checkpoint.directory())) {
    const std::string name = entry.path().filename().string();
    if ((!name.ends_with(".json") || name.ends_with(".index.json")) && name != "tokenizer.model" &&
        name != "merges.txt")
      continue;
    fs::copy_file(entry.path(), scratch / name, fs::copy_options::overwrite_existing, error);
    check(scratch / name);
  }
  fs::create_directories(output, error);
  check(output);
  for (const std::string_view name :
       kCheckpointFiles)  // those of another model would be mixed with this one's
    if (!fs::exists(scratch / name)) {
      fs::remove(output / name, error);
      check(output / name);
    }
  for (const auto& entry : fs::directory_iterator(scratch)) {
    move_file(entry.path(), output / entry.path().filename(), error);
    check(output / entry.path().filename());
  }
}

double verify_packed(const fs::path& path, const Assembly& assembly,
                     std::span<const std::vector<int32_t>> windows) {
  const ModelSpec& spec = assembly.spec;
  Decoder dense = Decoder::from_checkpoint(assembly.checkpoint);
  store_tables(dense, assembly.recipe);
  at::Tensor dense_hidden = dense.embed(ids_of(windows));
  for (int64_t i = 0; i < spec.layers; ++i) {
    check_interrupt();
    const auto block = dense.block(i);
    if (i < assembly.quantized_blocks) {
      const QuantizedBlock quantized = assembly.quantized(i);
      install(quantized, *block, spec);
      install(quantized.tensors, dense.final_norm(), spec.final_norm());
    }
    dense_hidden = run_block(*block, spec, dense_hidden);
  }

  const PackedReader reader = PackedReader::open(path);
  const Decoder packed = Decoder::from_packed(reader, find_backend("cpu"), at::kFloat);
  const at::Tensor packed_hidden = final_hidden_states(packed, windows);
  double difference = 0, energy = 0;
  for (int64_t w = 0; w < dense_hidden.size(0); ++w)
    for (int64_t first = 0; first < dense_hidden.size(1); first += kTokensPerVerification) {
      const auto logits = [&](const Decoder& decoder, const at::Tensor& hidden) {
        return decoder.logits(hidden[w]
                                  .narrow(0, first, std::min(kTokensPerVerification, hidden.size(1) - first))
                                  .unsqueeze(0));
      };
      const at::Tensor a = logits(dense, dense_hidden), b = logits(packed, packed_hidden);
      difference += (a - b).square().sum(at::kDouble).item<double>();
      energy += a.square().sum(at::kDouble).item<double>();
    }
  const double distance = std::sqrt(difference / energy);
  if (!(distance < kLogitTolerance))
    fail(ErrorCode::kVerifyFailed,
         "the packed file does not reproduce the quantizer's logits: relative distance {:.2e}, expected "
         "below {:.0e}; nothing was written",
         distance, kLogitTolerance);
  return distance;
}

}  // namespace stbllm
