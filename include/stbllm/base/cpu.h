#pragma once
// Choices between two correct ways that depend on the processor.

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <optional>

namespace stbllm {

#if defined(__x86_64__)
// clang 14 does not know these features by name.

/// Conversions between float16 and float32. Whether the system saves the registers is for AVX to say.
inline bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & 1u << 29) != 0;
}

/// Products of words in the encoding of AVX. Whether the system saves the registers is for AVX to say.
inline bool has_avx_vnni() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & 1u << 4) != 0;
}

/// Tiles of bfloat16 that the system saves, too. To be asked only where there is AVX-512, and xgetbv with it.
inline bool has_amx_bf16() {
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & 1u << 22) == 0) return false;
  constexpr unsigned kTileState = 3u << 17;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & kTileState) == kTileState;
}

/// Whether Linux lets this process use the tile registers of AMX, which a process has to ask for. It asks
/// once.
inline bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}
#endif

/// Answers that take the place of the processor's own. Tests set them (tests/support/processor.h), so that
/// every machine tries both sides of each choice; programs leave them empty.
inline std::optional<bool> assumed_fast_bfloat16, assumed_fast_permutations;

/// Whether products of bfloat16 are faster than those of float32. AVX512-BF16 alone does not say so: where
/// Intel's processors hide their AMX, as virtual machines do, vdpbf16ps has half the rate of AMD's and
/// float32 wins by almost two.
inline bool multiplies_bfloat16_fast() {
  if (assumed_fast_bfloat16) return *assumed_fast_bfloat16;
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") && (__builtin_cpu_is("amd") || has_amx_bf16());
#else
  return false;
#endif
}

/// Whether bytes and words are looked up as fast as words are multiplied: a permutation of two registers
/// (vpermi2b, vpermi2w of AVX-512) is one operation rather than three, and as many shuffles (vpshufb) as
/// products (vpmaddwd) start in a cycle.
inline bool permutes_fast() {
  if (assumed_fast_permutations) return *assumed_fast_permutations;
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace stbllm
