#pragma once
// Files that appear under their name complete or not at all, also when the power fails: the bytes go to a
// temporary file beside the target, then to the disk (fsync), then the file is renamed, then the new name
// goes to the disk (fsync of the directory). Without the first fsync some file systems keep the rename and
// lose the bytes, which leaves an empty file; without the second one the rename itself may be lost.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>

namespace stbllm {

/// Renames `from` to `to`, in the order above. When it returns, bytes and name are on the disk, except that
/// a file system which cannot fsync a directory keeps the name when it chooses to. Both paths are on the same
/// file system. Throws Error(kWriteFailed) naming the path and the system's reason.
void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to);

/// Throws Error(kExists) when there is something at `path`, be it a dangling link.
void refuse_existing_output(const std::filesystem::path& path);

/// A new file for reading and writing. The destructor removes it unless it was renamed. All members throw
/// Error(kWriteFailed) naming the path and the system's reason.
class TemporaryFile {
 public:
  /// Creates `<stem>.part-<process>-<number>` with the first number that is free.
  explicit TemporaryFile(const std::filesystem::path& stem);
  ~TemporaryFile();
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Appends `bytes`.
  void write(std::span<const std::byte> bytes);
  /// Fills `bytes` with what stands in the file from byte `offset` on.
  void read(int64_t offset, std::span<std::byte> bytes) const;
  /// Gives the file its final name, durably.
  void rename(const std::filesystem::path& target);
  /// Removes the name. The file stays usable and vanishes with this process, however that ends.
  void remove_name();

 private:
  [[noreturn]] void fail_here(std::string_view what) const;

  std::filesystem::path path_;
  bool has_name_ = true;
  int fd_ = -1;
};

/// The system calls whose order makes a file durable. Tests put recorders in their place.
struct DurabilityCalls {
  int (*fsync)(int fd);
  int (*rename)(const char* from, const char* to);
};
DurabilityCalls& durability_calls();

}  // namespace stbllm
