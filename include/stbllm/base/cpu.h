#pragma once
// Choices between two correct ways that depend on the processor.

#include <optional>

namespace stbllm {

/// Answers that take the place of the processor's own. Tests set them (tests/support/processor.h), so that
/// every machine tries both sides of each choice; programs leave them empty.
inline std::optional<bool> assumed_fast_bfloat16, assumed_fast_permutations;

/// Whether products of bfloat16 are faster than those of float32. AVX512-BF16 alone does not say so: where
/// Intel's processors hide their AMX, as virtual machines do, vdpbf16ps has half the rate of AMD's and
/// float32 wins by almost two.
inline bool multiplies_bfloat16_fast() {
  if (assumed_fast_bfloat16) return *assumed_fast_bfloat16;
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") &&
         (__builtin_cpu_is("amd") || __builtin_cpu_supports("amx-bf16"));
#else
  return false;
#endif
}

/// Whether a permutation of two registers of bytes or words (vpermi2b, vpermi2w) is one operation of AVX-512
/// rather than three.
inline bool permutes_fast() {
  if (assumed_fast_permutations) return *assumed_fast_permutations;
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace stbllm
