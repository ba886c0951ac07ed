#pragma once
// Sums over many tokens do not need the 24 bits of a float32 factor.

#include <ATen/Context.h>

#include "stbllm/base/cpu.h"

namespace stbllm {

/// While one lives, products of float32 matrices on the CPU round their factors to bfloat16 and keep float32
/// sums, where the processor multiplies these faster (multiplies_bfloat16_fast()). With AMX the statistics of
/// a block of Qwen2.5-Coder-1.5B take 28 s for 44 (`quantize --blocks 1 --profile`). Products of some hundred
/// columns gain nothing: what is rounded is copied first. The setting is libtorch's own and holds for the
/// whole process.
class RoundedProducts {
 public:
  explicit RoundedProducts(bool wanted)
      : before_(at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL)) {
    if (wanted && multiplies_bfloat16_fast()) set(at::Float32Precision::BF16);
  }
  ~RoundedProducts() { set(before_); }
  RoundedProducts(const RoundedProducts&) = delete;
  RoundedProducts& operator=(const RoundedProducts&) = delete;

 private:
  static void set(at::Float32Precision precision) {
    at::globalContext().setFloat32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL, precision);
  }
  at::Float32Precision before_;
};

}  // namespace stbllm
