#pragma once

#include <omp.h>

#if __has_include(<ATen/Parallel.h>)  // tests of what is built without libtorch use this, too
#include <ATen/Parallel.h>
#define STBLLM_TEST_HAS_TORCH
#endif

namespace stbllm::test {

/// Runs a scope with so many threads, which may be more than the machine has cores.
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { set(count); }
  ~Threads() { set(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  static void set(int count) {
#ifdef STBLLM_TEST_HAS_TORCH
    at::set_num_threads(count);
#endif
    omp_set_num_threads(count);
  }
  int before_;
};

}  // namespace stbllm::test
