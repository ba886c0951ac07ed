#include "ceilings.h"

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>

#include "stbllm/base/cpu.h"
#include "timing.h"

namespace stbllm::bench {
namespace {

// Keeps a result alive without storing it anywhere.
void keep(uint64_t value) { asm volatile("" : : "r"(value)); }

// Every thread sums its own part of 384 MiB in pieces; the best piece of each counts, so that a moment
// without other processes suffices.
double read_bandwidth(int threads) {
  constexpr size_t kCount = size_t{48} << 20, kPiece = size_t{1} << 20;
  static uint64_t* const buffer = [] {  // in huge pages, like the large arrays of the kernels
    auto* memory = static_cast<uint64_t*>(std::aligned_alloc(size_t{2} << 20, kCount * 8));
    madvise(memory, kCount * 8, MADV_HUGEPAGE);
    std::fill_n(memory, kCount, 1);
    return memory;
  }();
  double bytes_per_second = 0;
#pragma omp parallel num_threads(threads) reduction(+ : bytes_per_second)
  {
    const size_t share = kCount / omp_get_num_threads(), first = share * omp_get_thread_num();
    const double seconds = best_seconds(threads, 0, static_cast<int>(share / kPiece), [&](int piece) {
      uint64_t sum = 0;
      for (size_t i = 0; i < kPiece; ++i) sum += buffer[first + piece * kPiece + i];
      keep(sum);
    });
    bytes_per_second = kPiece * 8 / seconds;
  }
  return bytes_per_second;
}

#if defined(__x86_64__)
// Independent sums: more than latency times throughput of any of these instructions.
constexpr int kChains = 12;
constexpr int kRounds = 1 << 16;

// Runs one instruction on twelve independent registers over and over, with zeros: what lies in a register may
// be denormal, which takes the processor a hundred times as long. Returns operations per second.
#define STBLLM_TWELVE(m) m(0) m(1) m(2) m(3) m(4) m(5) m(6) m(7) m(8) m(9) m(10) m(11)
#define STBLLM_SIXTEEN                                                                                       \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14", "xmm15"
#define STBLLM_RATE(name, features, line)                                                                \
  __attribute__((target(features))) double name(double operations) {                                     \
    const double seconds = best_seconds(1, 0.05, 1, [](int) {                                            \
      asm volatile("vzeroall" ::: STBLLM_SIXTEEN);                                                       \
      for (int round = 0; round < kRounds; ++round) asm volatile(STBLLM_TWELVE(line)::: STBLLM_SIXTEEN); \
    });                                                                                                  \
    return operations * kChains * kRounds / seconds;                                                     \
  }

#define STBLLM_FMA(i) "vfmadd231ps %%zmm15, %%zmm15, %%zmm" #i "\n\t"
#define STBLLM_VNNI(i) "vpdpbusd %%zmm15, %%zmm15, %%zmm" #i "\n\t"
#define STBLLM_WORD_PRODUCTS(i) "vpdpwssd %%zmm15, %%zmm15, %%zmm" #i "\n\t"
#define STBLLM_BF16(i) "vdpbf16ps %%zmm15, %%zmm15, %%zmm" #i "\n\t"
#define STBLLM_WORDS(i) "vpermw %%zmm15, %%zmm14, %%zmm" #i "\n\t"
#define STBLLM_BYTES(i) "vpermi2b %%zmm15, %%zmm14, %%zmm" #i "\n\t"
STBLLM_RATE(fma_rate, "avx512f", STBLLM_FMA)
STBLLM_RATE(vnni_rate, "avx512f", STBLLM_VNNI)
STBLLM_RATE(word_product_rate, "avx512f", STBLLM_WORD_PRODUCTS)
STBLLM_RATE(bf16_rate, "avx512f", STBLLM_BF16)
STBLLM_RATE(word_lookup_rate, "avx512f", STBLLM_WORDS)
STBLLM_RATE(byte_lookup_rate, "avx512f", STBLLM_BYTES)

// The same for the tiles of AMX: 16 x 16 sums of 32 products each, in four of the eight registers.
double tile_rate() {
  alignas(64) uint8_t layout[64] = {1};  // palette; bytes per row from byte 16 on, rows from byte 48 on
  for (int tile = 0; tile < 8; ++tile) {
    layout[16 + 2 * tile] = 64;
    layout[48 + tile] = 16;
  }
  asm volatile("ldtilecfg %0" : : "m"(layout));  // which fills tiles with zeros
  const double seconds = best_seconds(1, 0.05, 1, [](int) {
    for (int round = 0; round < kRounds / 4; ++round)
      asm volatile(
          "tdpbf16ps %tmm6, %tmm4, %tmm0\n\t"
          "tdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
          "tdpbf16ps %tmm6, %tmm5, %tmm2\n\t"
          "tdpbf16ps %tmm7, %tmm5, %tmm3");
  });
  asm volatile("tilerelease");
  return 2.0 * 16 * 16 * 32 * kRounds / seconds;
}
#endif

}  // namespace

Ceilings measure_ceilings(int threads) {
  Ceilings ceilings;
  for (int t = 1; t <= threads; ++t) ceilings.bandwidth.push_back(read_bandwidth(t));
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw")) {
    ceilings.per_core["fp32 fma"] = fma_rate(32);
    ceilings.per_core["vpermw lookups"] = word_lookup_rate(32);
  }
  if (__builtin_cpu_supports("avx512vnni")) {
    ceilings.per_core["int8 vpdpbusd"] = vnni_rate(128);
    ceilings.per_core["int16 vpdpwssd"] = word_product_rate(64);
  }
  if (__builtin_cpu_supports("avx512bf16")) ceilings.per_core["bf16 vdpbf16ps"] = bf16_rate(64);
  if (__builtin_cpu_supports("avx512f") && has_amx_bf16() && may_use_amx())
    ceilings.per_core["bf16 tdpbf16ps"] = tile_rate();
  if (__builtin_cpu_supports("avx512vbmi")) ceilings.per_core["vpermi2b lookups"] = byte_lookup_rate(64);
#endif
  return ceilings;
}

}  // namespace stbllm::bench
