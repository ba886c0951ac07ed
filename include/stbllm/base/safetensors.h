#pragma once
// The safetensors container: the length of the header as a 64-bit number, the header in JSON, the bytes of
// all tensors. There is no libtorch here.
//
// A file written here has its tensors in the order of the format's own library: by element size, the largest
// first, then by name. Every tensor is thus aligned to its elements without holes, and the bytes of the file
// do not depend on the order of arrival.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/base/mapped_file.h"

namespace stbllm {

/// One tensor of a file. `data` points into the mapping, in row-major order.
struct TensorEntry {
  std::string dtype;  ///< "F32", "F16", "BF16", "U8", "I8", "I32", "I64", ...
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

/// The longest header that the format's own library accepts.
inline constexpr uint64_t kMaxSafetensorsHeader = 100'000'000;

/// Bytes of one element; 0 for a dtype that the format does not know.
int64_t dtype_bytes(std::string_view dtype);

class SafetensorsFile {
 public:
  /// Maps and validates: header length, JSON (no duplicate keys), dtypes, size = product of the shape,
  /// tensors that fill the data without overlap or hole, and the header's checksum where the metadata has
  /// one. Throws Error(kNotFound | kCorrupt).
  static std::shared_ptr<const SafetensorsFile> open(const std::filesystem::path& path);

  const std::map<std::string, TensorEntry>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::shared_ptr<const MappedFile>& file() const { return file_; }

 private:
  std::shared_ptr<const MappedFile> file_;
  std::map<std::string, TensorEntry> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a safetensors file whose tensors arrive one at a time and do not stay in memory: their bytes go to
/// a temporary file, from which finish() makes the whole file. Nothing is at `path` before commit() renames
/// it there, and a writer that never came to that leaves nothing behind.
class SafetensorsWriter {
 public:
  /// Throws Error(kExists) when `path` is there and not `force`; Error(kWriteFailed) when it is a directory
  /// or cannot be written. Temporary files are in `scratch`, a directory of the same file system, or, where
  /// that is empty, beside `path`.
  SafetensorsWriter(std::filesystem::path path, bool force, const std::filesystem::path& scratch = {});
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  /// Adds a tensor whose name is new. Throws Error(kWriteFailed) when the disk is full.
  void add(const std::string& name, std::string_view dtype, const std::vector<int64_t>& shape,
           std::span<const std::byte> data);
  /// Keys are those that are not written here. Throws Error(kUnsupported) when `value` is not UTF-8.
  void set_metadata(const std::string& key, std::string value);

  /// Writes header (data starts at a multiple of 256) and data to a temporary file and returns its path; the
  /// caller may open and verify it before commit(). Two metadata keys are added here: "checksums", a JSON
  /// object of tensor name -> checksum() (see checksum.h), and "header_checksum", that of all bytes before
  /// the data with its own 16 digits taken as '0'.
  std::filesystem::path finish();
  /// Whether a key is one of these two.
  static bool is_own_metadata(std::string_view key);
  /// Renames that file to `path`; bytes and name are on the disk when it returns (see durable_file.h). Throws
  /// Error(kExists) when `path` has appeared meanwhile and not `force`; Error(kWriteFailed).
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace stbllm
