#pragma once

#include <omp.h>

#if __has_include(<ATen/Parallel.h>)  // tests of what is built without libtorch use this, too
#include <ATen/Parallel.h>
#define STBLLM_TEST_HAS_TORCH
#endif

#include "stbllm/base/parallel.h"

namespace stbllm::test {

/// Runs a scope with so many threads, which may be more than the machine has cores: all of them work.
class Threads {
 public:
  explicit Threads(int count) { set(count), processors() = count; }
  ~Threads() { set(threads_before_), processors() = processors_before_; }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  static void set(int count) {
#ifdef STBLLM_TEST_HAS_TORCH
    at::set_num_threads(count);
#endif
    omp_set_num_threads(count);
  }
  const int threads_before_ = omp_get_max_threads(), processors_before_ = processors();
};

}  // namespace stbllm::test
