#include "stbllm/base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <string_view>
#include <utility>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

/// The files that are mapped, for the handler of SIGBUS, which may neither lock nor allocate. A file that
/// finds no free place is read all the same, and a loss of it is then told without its name.
std::array<std::atomic<const MappedFile*>, 1024> g_mapped;

void note(const MappedFile* file, const MappedFile* in_place_of) {
  for (auto& place : g_mapped)
    if (const MappedFile* expected = in_place_of; place.compare_exchange_strong(expected, file)) return;
}

void write_stderr(std::string_view text) {
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
}

void on_lost_page(int, siginfo_t* info, void*) {
  const auto* address = static_cast<const std::byte*>(info->si_addr);
  std::string_view path = "a mapped file";
  for (const auto& place : g_mapped) {
    const MappedFile* file = place.load();
    if (file == nullptr || address < file->bytes().data() ||
        address >= file->bytes().data() + file->bytes().size())
      continue;
    path = file->path().native();
    break;
  }
  write_stderr("error: ");
  write_stderr(path);
  write_stderr(
      ": cannot be read any more: it was truncated while in use, or its disk fails; copy or make the file "
      "anew\n");
  ::_exit(static_cast<int>(ErrorCode::kCorrupt));
}

}  // namespace

void exit_when_mapped_file_is_lost() {
  struct sigaction action {};
  action.sa_sigaction = on_lost_page;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGBUS, &action, nullptr);
}

std::shared_ptr<const MappedFile> MappedFile::open(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail(ErrorCode::kNotFound, "{}: cannot open: {}", path.string(), std::strerror(errno));
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    fail(ErrorCode::kNotFound, "{}: expected a regular file", path.string());
  }
  if (info.st_size == 0) {
    ::close(fd);
    fail(ErrorCode::kCorrupt, "{}: the file is empty", path.string());
  }
  void* data = ::mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
  const int map_error = errno;
  ::close(fd);
  if (data == MAP_FAILED)
    fail(ErrorCode::kNotFound, "{}: cannot map: {}", path.string(), std::strerror(map_error));
  return std::shared_ptr<const MappedFile>(
      new MappedFile(path, {static_cast<const std::byte*>(data), static_cast<size_t>(info.st_size)}));
}

MappedFile::MappedFile(std::filesystem::path path, std::span<const std::byte> bytes)
    : path_(std::move(path)), bytes_(bytes) {
  note(this, /*in_place_of=*/nullptr);
}

MappedFile::~MappedFile() {
  note(nullptr, /*in_place_of=*/this);
  ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void MappedFile::release(std::span<const std::byte> range) const {
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(range.data()) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(range.data()) + range.size()) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace stbllm
