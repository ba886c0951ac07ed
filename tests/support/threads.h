#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

namespace stbllm::test {

/// Runs a scope with so many threads.
class Threads {
 public:
  explicit Threads(int count) : before_(at::get_num_threads()) { set(count); }
  ~Threads() { set(before_); }

 private:
  static void set(int count) {
    at::set_num_threads(count);
    omp_set_num_threads(count);
  }
  int before_;
};

}  // namespace stbllm::test
