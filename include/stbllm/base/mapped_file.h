#pragma once
// A file that is mapped into memory and only read.

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

namespace stbllm {

/// From now on a page of a mapped file that cannot be read, because the file was truncated meanwhile or its
/// disk fails, ends the program with one sentence on stderr and the exit status of ErrorCode::kCorrupt. The
/// signal that the system sends then, SIGBUS, would end it without a word. For main().
void exit_when_mapped_file_is_lost();

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
