#include "stbllm/base/durable_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail_to(std::string_view what, const fs::path& path) {
  fail(ErrorCode::kWriteFailed, "{}: cannot {}: {}; check the path and the disk", path.string(), what,
       std::strerror(errno));
}

/// An open file descriptor.
class Descriptor {
 public:
  Descriptor(const fs::path& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC)) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

void sync_file(const fs::path& path) {
  // fsync writes back the file, not what came through one descriptor: a new one serves as well.
  const Descriptor file(path, O_RDONLY);
  if (file.get() < 0 || durability_calls().fsync(file.get()) != 0) fail_to("write", path);
}

void sync_directory(const fs::path& path) {
  const Descriptor directory(path, O_RDONLY | O_DIRECTORY);
  if (directory.get() < 0 && errno == EACCES) return;  // one may add files to a directory one may not read
  if (directory.get() < 0) fail_to("open", path);
  const bool synced = durability_calls().fsync(directory.get()) == 0;
  // Some network and user-space file systems answer EINVAL: they have no fsync of directories.
  if (!synced && errno != EINVAL) fail_to("write", path);
}

}  // namespace

void refuse_existing_output(const fs::path& path) {
  std::error_code ignored;
  if (fs::exists(fs::symlink_status(path, ignored)))
    fail(ErrorCode::kExists, "{}: the output is there already; choose another path or pass --force",
         path.string());
}

DurabilityCalls& durability_calls() {
  static DurabilityCalls calls{.fsync = ::fsync, .rename = ::rename};
  return calls;
}

void rename_durably(const fs::path& from, const fs::path& to) {
  sync_file(from);
  if (durability_calls().rename(from.c_str(), to.c_str()) != 0)
    fail_to(fmt::format("rename to {}", to.filename().string()), from);
  sync_directory(to.has_parent_path() ? to.parent_path() : fs::path("."));
}

TemporaryFile::TemporaryFile(const fs::path& stem) {
  for (int number = 0; fd_ < 0; ++number) {
    path_ = stem;
    path_ += fmt::format(".part-{}-{}", ::getpid(), number);
    fd_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0 && errno != EEXIST) fail_here("create");
  }
}

TemporaryFile::~TemporaryFile() {
  remove_name();
  ::close(fd_);
}

void TemporaryFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t count = ::write(fd_, bytes.data(), bytes.size());
    if (count < 0 && errno != EINTR) fail_here("write");
    if (count > 0) bytes = bytes.subspan(static_cast<size_t>(count));
  }
}

void TemporaryFile::read(int64_t offset, std::span<std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t count = ::pread(fd_, bytes.data(), bytes.size(), offset);
    if (count == 0) errno = EIO;  // the file is shorter than what was written to it
    if (count == 0 || (count < 0 && errno != EINTR)) fail_here("read back");
    if (count < 0) continue;
    bytes = bytes.subspan(static_cast<size_t>(count));
    offset += count;
  }
}

void TemporaryFile::rename(const fs::path& target) {
  rename_durably(path_, target);
  has_name_ = false;
}

void TemporaryFile::remove_name() {
  if (has_name_) ::unlink(path_.c_str());
  has_name_ = false;
}

void TemporaryFile::fail_here(std::string_view what) const { fail_to(what, path_); }

}  // namespace stbllm
