#include "block_file.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>

#include "stbllm/base/error.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {

namespace fs = std::filesystem;

std::string block_file_name(int64_t block) { return fmt::format("block_{:03}.safetensors", block); }

void save_block(const fs::path& path, const QuantizedBlock& quantized) {
  PackedWriter writer(path, /*force=*/true);
  nlohmann::json results = nlohmann::json::array();
  for (const LinearResult& result : quantized.results) results.push_back(to_json(result, true));
  // Results without a packed form (the released arithmetic) are kept dense.
  for (const auto& [name, weight] : quantized.linears) {
    if (weight.unpackable.defined())
      writer.add_dense(name + ".weight", "F32", weight.unpackable.sizes().vec(),
                       bytes_of(weight.unpackable.contiguous()));
    else
      writer.add_linear(name, pack_weight(weight, name));
  }
  for (const auto& [name, tensor] : quantized.tensors)
    writer.add_dense(name, "F32", tensor.sizes().vec(), bytes_of(tensor.contiguous()));
  writer.set_metadata("results", results.dump());
  writer.set_metadata("tune", quantized.tune ? nlohmann::json(*quantized.tune).dump() : "null");
  writer.finish();
  writer.commit();
}

std::optional<QuantizedBlock> load_block(const fs::path& path) {
  if (!fs::exists(path)) return std::nullopt;
  const PackedReader reader = [&] {
    try {
      PackedReader opened = PackedReader::open(path);
      opened.verify_checksums();
      return opened;
    } catch (const Error& error) {
      fail(error.code(), "{}; remove this file, and --resume makes it again", error.what());
    }
  }();
  QuantizedBlock quantized;
  for (const auto& json : nlohmann::json::parse(reader.metadata("results")))
    quantized.results.push_back(linear_result_from_json(json));
  if (const auto tune = nlohmann::json::parse(reader.metadata("tune")); !tune.is_null())
    quantized.tune = tune.get<TuneReport>();
  for (const auto& [name, matrix] : reader.linears()) quantized.linears.emplace(name, unpack_weight(matrix));
  for (const auto& [name, entry] : reader.dense_tensors()) {
    if (entry.dtype != "F32")
      fail(ErrorCode::kCorrupt,
           "{}: tensor {} has dtype {}, expected F32; remove this file, and --resume makes "
           "it again",
           path.string(), name, entry.dtype);
    const at::Tensor tensor =
        at::from_blob(const_cast<std::byte*>(entry.data.data()), entry.shape, at::kFloat).clone();
    const std::string linear = name.ends_with(".weight") ? name.substr(0, name.size() - 7) : "";
    const bool unpackable = std::any_of(quantized.results.begin(), quantized.results.end(),
                                        [&](const LinearResult& result) { return result.name == linear; });
    if (unpackable)
      quantized.linears[linear].unpackable = tensor;
    else
      quantized.tensors.emplace(name, tensor);
  }
  return quantized;
}

void save_blocks(const fs::path& directory, const std::vector<QuantizedBlock>& blocks) {
  std::error_code ignored;  // A directory that is not there shows when the first file is written.
  fs::create_directories(directory, ignored);
  for (size_t i = 0; i < blocks.size(); ++i)
    save_block(directory / block_file_name(static_cast<int64_t>(i)), blocks[i]);
}

std::optional<std::vector<QuantizedBlock>> load_blocks(const fs::path& directory, size_t count) {
  std::vector<QuantizedBlock> blocks;
  for (size_t i = 0; i < count; ++i) {
    auto block = load_block(directory / block_file_name(static_cast<int64_t>(i)));
    if (!block) return std::nullopt;
    blocks.push_back(std::move(*block));
  }
  return blocks;
}

}  // namespace stbllm
