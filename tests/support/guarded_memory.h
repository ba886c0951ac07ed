#pragma once
// Memory that ends where its last byte is: one more is on a page that nobody may touch.

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <new>
#include <span>

namespace stbllm::test {

class GuardedMemory {
 public:
  /// `bytes` bytes, of which the first is at a multiple of 16 where `bytes` is one. The rest of its page lies
  /// in front of them, and a page that nobody may touch in front of that.
  explicit GuardedMemory(size_t bytes)
      : page_(static_cast<size_t>(::sysconf(_SC_PAGESIZE))),
        usable_((bytes + page_ - 1) / page_ * page_),
        bytes_(bytes) {
    void* const mapped = ::mmap(nullptr, usable_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    pages_ = static_cast<std::byte*>(mapped);
    if (usable_ > 0 && ::mprotect(pages_ + page_, usable_, PROT_READ | PROT_WRITE) != 0)
      throw std::bad_alloc();
  }
  ~GuardedMemory() { ::munmap(pages_, usable_ + 2 * page_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() { return pages_ + page_ + usable_ - bytes_; }
  /// What is in front of data() and is not part of it.
  std::span<std::byte> slack() { return {pages_ + page_, usable_ - bytes_}; }
  void fill(int byte) { std::memset(pages_ + page_, byte, usable_); }

 private:
  const size_t page_, usable_, bytes_;
  std::byte* pages_;
};

}  // namespace stbllm::test
