#pragma once
// A packed model: one .safetensors file with the planes of all linears, dense tensors, config, tokenizer and
// where it came from. FORMAT.md is the specification.

#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "stbllm/base/safetensors.h"
#include "stbllm/pack/quantized_rows.h"
#include "stbllm/pack/structured_binary_matrix.h"

namespace stbllm {

inline constexpr int kPackedFormatVersion = 1;

/// Writes a packed model. All members throw as those of SafetensorsWriter do, through which it writes.
class PackedWriter {
 public:
  PackedWriter(std::filesystem::path path, bool force, const std::filesystem::path& scratch = {});
  /// Writes the planes of a linear as `<name>.codes`, `<name>.scales`, ... They do not stay in memory.
  void add_linear(const std::string& name, const StructuredBinaryMatrix& matrix);
  /// Writes `<name>.q8` or `<name>.q4` and `<name>.row_scales`.
  void add_quantized_rows(const std::string& name, const QuantizedRows& rows);
  /// Writes a tensor as it is; `dtype` is the name that safetensors has for it.
  void add_dense(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
                 std::span<const std::byte> data);
  /// Keys are "config" (the checkpoint's config.json), "tokenizer", "recipe", "calibration", "results",
  /// "version" and others, but not those that are written here.
  void set_metadata(const std::string& key, std::string value);
  /// Whether a key is one of the format itself: "format", "format_version", "linears", "quantized_rows", and
  /// those of SafetensorsWriter.
  static bool is_own_metadata(std::string_view key);
  std::filesystem::path finish();  ///< writes a complete temporary file and returns its path
  void commit();                   ///< renames that file to the path of this writer

 private:
  SafetensorsWriter file_;
  nlohmann::json linears_ = nlohmann::json::object();
  nlohmann::json quantized_rows_ = nlohmann::json::object();
};

/// A packed model that is mapped into memory. Its matrices are views of the mapping and keep it alive.
class PackedReader {
 public:
  /// Opens a file and checks everything that FORMAT.md asks for except the checksums of tensors: format
  /// version, layouts, sizes of planes, lists of columns, ranges of codes and scales. Throws Error(kNotFound
  /// | kCorrupt), or Error(kUnsupported) for a safetensors file that is no packed model or has another format
  /// version.
  static PackedReader open(const std::filesystem::path& path);
  const std::map<std::string, StructuredBinaryMatrix>& linears() const { return linears_; }
  const std::map<std::string, QuantizedRows>& quantized_rows() const { return quantized_rows_; }
  bool has_dense(const std::string& name) const { return dense_.contains(name); }
  const TensorEntry& dense(const std::string& name) const;  ///< Throws Error(kMismatch) when missing
  const std::map<std::string, TensorEntry>& dense_tensors() const { return dense_; }
  const std::string& metadata(const std::string& key) const;  ///< Throws Error(kCorrupt) when missing
  nlohmann::json config() const;  ///< the model's config.json. Throws Error(kCorrupt) when missing or no JSON
  /// What the program that wrote the file said under a key that a model does not need: JSON, a string where
  /// it is no JSON, null when it said nothing.
  nlohmann::json remark(const std::string& key) const;
  const std::shared_ptr<const SafetensorsFile>& file() const { return file_; }
  int64_t file_bytes() const;
  /// Recomputes every checksum. Throws Error(kCorrupt) naming the first tensor that differs.
  void verify_checksums() const;

 private:
  std::shared_ptr<const SafetensorsFile> file_;
  std::map<std::string, StructuredBinaryMatrix> linears_;
  std::map<std::string, QuantizedRows> quantized_rows_;
  std::map<std::string, TensorEntry> dense_;
};

}  // namespace stbllm
