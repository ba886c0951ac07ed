#pragma once
// A file that is mapped into memory and only read.

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

namespace stbllm {

class MappedFile {
 public:
  /// Throws Error(kNotFound) when the file cannot be opened, Error(kCorrupt) when it is empty.
  static std::shared_ptr<const MappedFile> open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }
  const std::filesystem::path& path() const { return path_; }
  /// Tells the system that this range will not be needed again soon, so that it leaves memory. It may be read
  /// again all the same. Only whole pages within the range are given up.
  void release(std::span<const std::byte> range) const;

 private:
  MappedFile(std::filesystem::path path, std::span<const std::byte> bytes);
  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
};

}  // namespace stbllm
