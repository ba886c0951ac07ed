#pragma once
// A HuggingFace checkpoint directory that is written.

#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

/// The directory is assembled beside its target and appears there as a whole, in place of the checkpoint that
/// was there; other files of that directory stay. A writer that never came to commit() leaves nothing behind.
/// All members throw Error(kWriteFailed).
class CheckpointWriter {
 public:
  explicit CheckpointWriter(const std::filesystem::path& directory);
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Adds a tensor to model.safetensors. Its bytes do not stay in memory.
  void add(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
           std::span<const std::byte> data);
  /// Adds a file such as tokenizer.json.
  void add_file(const std::string& name, std::string_view text);
  /// Writes config.json. Readers round weights to the dtype that it names, so that is `dtype` afterwards
  /// ("float32", "bfloat16", "float16"), whatever it was in the checkpoint that the configuration is from.
  void add_config(const nlohmann::json& config, std::string_view dtype);
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stbllm
