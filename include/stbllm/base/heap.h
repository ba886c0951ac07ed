#pragma once
// How this program uses the heap of the C library. Both functions do nothing with another library than glibc.

#include <limits>

#if defined(__GLIBC__)  // <limits> has defined it
#include <malloc.h>
#endif

namespace stbllm {

/// Gives freed memory back to the system, so that resident memory is memory in use.
inline void release_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

/// Keeps freed memory for the next allocation. Products and activations ask for the same large blocks again
/// and again; the C library would give them back to the system in between, which then clears them page by
/// page.
inline void keep_freed_memory() {
#if defined(__GLIBC__)
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

}  // namespace stbllm
