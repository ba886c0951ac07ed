#include "stbllm/checkpoint/checkpoint.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <fstream>
#include <set>
#include <string_view>

#include "stbllm/base/error.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"
#include "stbllm/checkpoint/sources.h"

namespace stbllm {
namespace fs = std::filesystem;
namespace {

/// The JSON object in `path`.
nlohmann::json read_object(const fs::path& path) {
  const std::string text = read_text(path);
  nlohmann::json object;
  try {
    object = parse_json(text);
  } catch (const std::exception& error) {  // of nlohmann, or Error
    fail(ErrorCode::kCorrupt, "{}: not JSON that can be read: {}", path.string(), error.what());
  }
  if (!object.is_object()) fail(ErrorCode::kCorrupt, "{}: expected a JSON object", path.string());
  return object;
}

/// Clones made without Git LFS hold small text files in place of the weights.
void refuse_lfs_pointer(const fs::path& path) {
  constexpr std::string_view kPointer = "version https://git-lfs";
  std::string start(kPointer.size(), '\0');
  std::ifstream(path, std::ios::binary).read(start.data(), static_cast<std::streamsize>(start.size()));
  if (start == kPointer) {
    fail(ErrorCode::kCorrupt,
         "{}: a Git LFS pointer, not the file itself; run `git lfs pull` in its directory", path.string());
  }
}

std::shared_ptr<const TensorSource> open_source(const fs::path& path) {
  if (std::error_code ignored;
      !fs::exists(path, ignored))  // an index may ask for a name that no file can have
    fail(ErrorCode::kNotFound, "{}: this file of the checkpoint is missing", path.string());
  refuse_lfs_pointer(path);
  return path.extension() == ".safetensors" ? open_safetensors(path) : open_torch_pickle(path);
}

/// "weight_map" of an index: tensor name -> shard beside the index.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const nlohmann::json index = read_object(path);
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    fail(ErrorCode::kCorrupt, "{}: expected an object \"weight_map\" of tensor names and files",
         path.string());
  }
  std::map<std::string, std::string> shards;
  for (const auto& [name, shard] : weight_map->items()) {
    const fs::path file = shard.is_string() ? shard.get<std::string>() : "";
    if (!file.has_filename() || file != file.filename() || file == "." || file == "..") {
      fail(ErrorCode::kCorrupt, "{}: tensor {}: expected the name of a file beside the index, found {}",
           path.string(), name, shard.dump());
    }
    shards[name] = file.string();
  }
  return shards;
}

}  // namespace

Checkpoint Checkpoint::open(const fs::path& directory) {
  if (!fs::exists(directory)) fail(ErrorCode::kNotFound, "{}: no such directory", directory.string());
  if (!fs::is_directory(directory)) {
    fail(ErrorCode::kNotFound, "{}: expected the directory of a HuggingFace checkpoint, found a file",
         directory.string());
  }
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  if (!fs::exists(directory / "config.json")) {
    fail(ErrorCode::kNotFound, "{}: no config.json; expected the directory of a HuggingFace checkpoint",
         directory.string());
  }
  checkpoint.config_ = read_object(directory / "config.json");
  for (const char* weights : {"model.safetensors", "pytorch_model.bin"}) {
    const fs::path single = directory / weights, index = single.string() + ".index.json";
    if (fs::exists(single)) {
      checkpoint.add(open_source(single));
      return checkpoint;
    }
    if (fs::exists(index)) {
      checkpoint.add_shards(index);
      return checkpoint;
    }
  }
  fail(ErrorCode::kNotFound,
       "{}: neither model.safetensors nor pytorch_model.bin is there, nor an index of shards",
       directory.string());
}

void Checkpoint::add(std::shared_ptr<const TensorSource> source) {
  for (const std::string& name : source->names()) {
    const auto [entry, is_new] = tensors_.emplace(name, source);
    if (!is_new) {
      fail(ErrorCode::kMismatch, "tensor {} is in two files: {} and {}", name, entry->second->path().string(),
           source->path().string());
    }
  }
}

void Checkpoint::add_shards(const fs::path& index) {
  const auto shard_of = read_index(index);
  std::set<std::string> shards;
  for (const auto& [name, shard] : shard_of) shards.insert(shard);
  for (const std::string& shard : shards) add(open_source(directory_ / shard));
  for (const auto& [name, shard] : shard_of) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end() || found->second->path() != directory_ / shard) {
      fail(ErrorCode::kMismatch, "{}: tensor {} should be in {}, it is not there", index.string(), name,
           shard);
    }
  }
}

const TensorSource& Checkpoint::source(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end())
    fail(ErrorCode::kMismatch, "{}: tensor {} is missing", directory_.string(), name);
  return *found->second;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, source] : tensors_) names.push_back(name);
  return names;
}

bool Checkpoint::contains(const std::string& name) const { return tensors_.contains(name); }

std::vector<int64_t> Checkpoint::shape(const std::string& name) const { return source(name).shape(name); }

at::Tensor Checkpoint::load(const std::string& name, const std::vector<int64_t>& shape) const {
  const TensorSource& from = source(name);
  if (const auto found = from.shape(name); found != shape) {
    fail(ErrorCode::kMismatch, "{}: tensor {}: expected shape [{}], found [{}]", from.path().string(), name,
         fmt::join(shape, ", "), fmt::join(found, ", "));
  }
  return from.load(name);
}

void Checkpoint::release(const std::string& name) const { source(name).release(name); }

}  // namespace stbllm
