#pragma once
// Sixteen rows side by side: the inner loops of the quantizer run over this many rows in lockstep, so that the compiler
// turns them into vector code for each instruction set and no result depends on how rows are split over threads.

#include <cstdint>
#include <cstring>

namespace stbllm {

inline constexpr int kLanes = 16;

/// Compiles a function for AVX-512, AVX2 and the baseline; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define STBLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STBLLM_CLONES
#endif
#define STBLLM_INLINE inline __attribute__((always_inline))

/// kLanes neighbours in memory: one vector register, or a few. A comparison gives -1 where it holds, else 0.
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * kLanes)));

STBLLM_INLINE Lanes load_lanes(const float* from, int count = kLanes) {  // zeros behind `count`
  Lanes x = {};
  std::memcpy(&x, from, sizeof(float) * count);
  return x;
}
STBLLM_INLINE void store_lanes(float* to, Lanes x, int count = kLanes) { std::memcpy(to, &x, sizeof(float) * count); }
STBLLM_INLINE Lanes magnitude_of(Lanes x) { return (Lanes)((IntLanes)x & 0x7fffffff); }

}  // namespace stbllm
