#pragma once
// A HuggingFace checkpoint directory as tensors by name, whatever files they are in.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace stbllm {

/// The tensors of one file: a safetensors file or a pytorch_model.bin.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual const std::filesystem::path& path() const = 0;
  virtual std::vector<std::string> names() const = 0;
  virtual std::vector<int64_t> shape(const std::string& name) const = 0;
  /// A contiguous view of the mapped file in the file's own dtype (F32, F16, BF16), which must not be written
  /// to. Only what cannot be a view is copied: elements that are compressed, strided or not aligned to their
  /// size. Throws Error(kUnsupported) for another dtype.
  virtual at::Tensor load(const std::string& name) const = 0;
  /// Lets the pages of a tensor leave memory; they come back when it is read again.
  virtual void release(const std::string& name) const = 0;
};

class Checkpoint {
 public:
  /// Opens `directory`: config.json, then the first of model.safetensors, model.safetensors.index.json,
  /// pytorch_model.bin, pytorch_model.bin.index.json. The index and the headers of all shards are validated
  /// here. Throws Error(kNotFound | kCorrupt | kMismatch | kUnsupported).
  static Checkpoint open(const std::filesystem::path& directory);

  const std::filesystem::path& directory() const { return directory_; }
  const nlohmann::json& config() const { return config_; }

  std::vector<std::string> names() const;  ///< of all tensors, sorted
  bool contains(const std::string& name) const;
  /// Throws Error(kMismatch) when the tensor is missing.
  std::vector<int64_t> shape(const std::string& name) const;
  /// The tensor `name`, which must have `shape`, in the file's dtype (F32, F16, BF16), a view of the mapping.
  /// Throws Error(kMismatch) naming tensor, file, expected and found; Error(kUnsupported) for another dtype.
  at::Tensor load(const std::string& name, const std::vector<int64_t>& shape) const;
  /// Lets the pages of a tensor leave memory; they come back when it is read again.
  void release(const std::string& name) const;

 private:
  void add(std::shared_ptr<const TensorSource> source);
  void add_shards(const std::filesystem::path& index);
  const TensorSource& source(const std::string& name) const;

  std::filesystem::path directory_;
  nlohmann::json config_;
  std::map<std::string, std::shared_ptr<const TensorSource>> tensors_;  // by tensor name
};

}  // namespace stbllm
