#include "spill.h"

#include <ATen/ATen.h>
#include <ATen/MapAllocator.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "stbllm/base/error.h"

namespace stbllm {

at::Tensor spilled_tensor(at::IntArrayRef sizes, at::ScalarType dtype,
                          const std::filesystem::path& directory) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const int64_t bytes = count * static_cast<int64_t>(c10::elementSize(dtype));
  std::string path = (directory / ".spilled-XXXXXX").string();
  const int fd = ::mkstemp(path.data());
  if (fd < 0)
    fail(ErrorCode::kWriteFailed, "{}: cannot create a file for {} bytes of hidden states: {}",
         directory.string(), bytes, std::strerror(errno));
  // Room is taken now: a full disk is an error here, and a bus error when a page is written later.
  const int status = ::posix_fallocate(fd, 0, bytes);
  ::close(fd);
  if (status != 0) {
    ::unlink(path.c_str());
    fail(ErrorCode::kWriteFailed,
         "{}: no room for {} bytes of hidden states ({}); free some, or pass a larger --max-memory",
         directory.string(), bytes, std::strerror(status));
  }
  const at::Tensor tensor = at::from_file(path, /*shared=*/true, count, at::TensorOptions(dtype));
  ::unlink(path.c_str());
  return tensor.view(sizes);
}

void release_spilled(const at::Tensor& part) {
  if (at::MapAllocator::fromDataPtr(part.storage().data_ptr()) == nullptr) return;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<uintptr_t>(part.data_ptr()), first = begin / page * page;
  ::madvise(reinterpret_cast<void*>(first), begin + part.nbytes() - first,
            MADV_DONTNEED);  // of a shared file: nothing is lost
}

}  // namespace stbllm
