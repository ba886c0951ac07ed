#pragma once
// A packed model: one .safetensors file with planes, dense tensors, config, tokenizer and provenance. See
// FORMAT.md.

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

class PackedWriter {
 public:
  /// Throws as SafetensorsWriter does, and so do all members.
  PackedWriter(std::filesystem::path path, bool force, const std::filesystem::path& scratch = {});
  /// Writes the planes of a linear as `<name>.codes`, `<name>.scales`, ... Bytes are on disk when this
  /// returns.
  void add_linear(const std::string& name, const StructuredBinaryMatrix& matrix);
  /// Writes `<name>.q8` or `<name>.q4` and `<name>.row_scales`.
  void add_quantized_rows(const std::string& name, const QuantizedRows& rows);
  void add_dense(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
                 std::span<const std::byte> data);
  /// "config" (the checkpoint's config.json), "tokenizer", "recipe", "calibration", "results", "version", ...
  /// The keys of the format itself ("format", "format_version", "linears", "quantized_rows", "checksums",
  /// "header_checksum") are not to be set.
  void set_metadata(const std::string& key, std::string value);
  std::filesystem::path finish();  ///< a complete temporary file, to be verified
  void commit();                   ///< renamed into place

 private:
  SafetensorsWriter file_;
  nlohmann::json linears_ = nlohmann::json::object();
  nlohmann::json quantized_rows_ = nlohmann::json::object();
};

class PackedReader {
 public:
  /// Opens and validates everything that can be validated without reading all bytes twice: format version,
  /// layouts, plane sizes, column lists, code ranges. Throws Error(kNotFound | kCorrupt), or
  /// Error(kUnsupported) for a safetensors file that is no packed model or has another format version.
  static PackedReader open(const std::filesystem::path& path);
  const std::map<std::string, StructuredBinaryMatrix>& linears() const { return linears_; }
  const std::map<std::string, QuantizedRows>& quantized_rows() const { return quantized_rows_; }
  bool has_dense(const std::string& name) const { return dense_.contains(name); }
  const TensorEntry& dense(const std::string& name) const;  ///< Throws Error(kMismatch) when missing
  const std::map<std::string, TensorEntry>& dense_tensors() const { return dense_; }
  const std::string& metadata(const std::string& key) const;  ///< Throws Error(kCorrupt) when missing
  /// What the program that wrote the file said under a key that a model does not need: JSON, a string where
  /// it is none, null when it said nothing.
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
