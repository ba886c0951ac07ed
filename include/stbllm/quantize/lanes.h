#pragma once
// Sixteen rows side by side: the inner loops of the quantizer run over this many rows in lockstep, so that the compiler
// turns them into vector code for each instruction set and no result depends on how rows are split over threads.

#include <cstdint>

namespace stbllm {

inline constexpr int kLanes = 16;

/// Compiles a function for AVX-512, AVX2 and the baseline; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define STBLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STBLLM_CLONES
#endif
#define STBLLM_INLINE inline __attribute__((always_inline))

}  // namespace stbllm
