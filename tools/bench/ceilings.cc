#include "ceilings.h"

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstddef>

namespace stbllm::bench {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <typename F>
double best_seconds(int repetitions, F&& f) {
  double best = 1e9;
  for (int i = 0; i < repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, seconds_since(start));
  }
  return best;
}

// Keeps a result alive without storing it anywhere.
void keep(uint64_t value) { asm volatile("" : : "r"(value)); }

double read_bandwidth(int threads) {
  const size_t count = size_t{48} << 20;  // 384 MiB, far more than any cache here
  static const std::vector<uint64_t> buffer(count, 1);
  const double seconds = best_seconds(5, [&] {
    uint64_t sum = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : sum)
    for (size_t i = 0; i < count; ++i) sum += buffer[i];
    keep(sum);
  });
  return static_cast<double>(count * 8) / seconds;
}

constexpr int kChains =
    16;  // independent sums: more than latency times throughput of any of these instructions
constexpr int kRounds = 1 << 18;

// The rate of `instruction` on kChains independent registers, in operations per second. A macro, since a
// function template could not carry the target attribute to its lambda.
#define STBLLM_RATE(name, features, type, zero, instruction)             \
  __attribute__((target(features))) double name(double operations) {     \
    type sums[kChains];                                                  \
    for (type & s : sums) s = zero;                                      \
    type a = zero;                                                       \
    asm volatile("" : "+v"(a));                                          \
    const double seconds = best_seconds(                                 \
        9, [&]() __attribute__((target(features))) {                     \
          for (int round = 0; round < kRounds; ++round) {                \
            _Pragma("GCC unroll 16") for (int i = 0; i < kChains; ++i) { \
              type& s = sums[i];                                         \
              s = instruction;                                           \
              asm volatile("" : "+v"(s));                                \
            }                                                            \
          }                                                              \
        });                                                              \
    return operations * kChains * kRounds / seconds;                     \
  }

STBLLM_RATE(fma_rate, "avx512f", __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(a, a, s))
STBLLM_RATE(vnni_rate, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(s, a, a))
STBLLM_RATE(bf16_rate, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
            _mm512_dpbf16_ps(s, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(a)))
STBLLM_RATE(word_lookup_rate, "avx512f,avx512bw", __m512i, _mm512_setzero_si512(),
            _mm512_permutexvar_epi16(s, a))
STBLLM_RATE(byte_lookup_rate, "avx512f,avx512bw,avx512vbmi", __m512i, _mm512_setzero_si512(),
            _mm512_permutex2var_epi8(a, s, a))

}  // namespace

Ceilings measure_ceilings(int threads) {
  Ceilings ceilings;
  for (int t = 1; t <= threads; ++t) ceilings.bandwidth.push_back(read_bandwidth(t));
  if (__builtin_cpu_supports("avx512bw")) {
    ceilings.per_core["fp32 fma"] = fma_rate(32);
    ceilings.per_core["vpermw lookups"] = word_lookup_rate(32);
  }
  if (__builtin_cpu_supports("avx512vnni")) ceilings.per_core["int8 vpdpbusd"] = vnni_rate(128);
  if (__builtin_cpu_supports("avx512bf16")) ceilings.per_core["bf16 vdpbf16ps"] = bf16_rate(64);
  if (__builtin_cpu_supports("avx512vbmi")) ceilings.per_core["vpermi2b lookups"] = byte_lookup_rate(64);
  return ceilings;
}

}  // namespace stbllm::bench
