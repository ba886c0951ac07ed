#pragma once
// Everything a kernel takes from the machine: indices, barriers, and the instructions that C++ has no word
// for. Under nvcc each is one PTX instruction; elsewhere it is a plain model of that instruction, written
// from the PTX ISA manual, on the fibers of tests/support/simt.h, so that tests can run the kernels without a
// device.

#include <cstddef>
#include <cstdint>

#include "fragments.h"

#ifdef __CUDACC__
#define STBLLM_DEVICE __device__ __forceinline__
#else
#include <algorithm>
#include <bit>
#include <cstring>

#include "stbllm/backend/activations.h"
#include "stbllm/base/bits.h"
#include "support/simt.h"
#define STBLLM_DEVICE inline
#endif

namespace stbllm::cuda {

/// 16 bytes that are loaded and stored at once.
struct alignas(16) Words4 {
  uint32_t word[4];
};

#ifdef __CUDACC__

STBLLM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
STBLLM_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
STBLLM_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
/// The block's dynamic shared memory.
STBLLM_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(128) std::byte memory[];
  return memory;
}
STBLLM_DEVICE void sync_threads() { __syncthreads(); }
STBLLM_DEVICE void sync_warp() { __syncwarp(); }
/// The largest value of all lanes.
STBLLM_DEVICE uint32_t warp_max(uint32_t value) { return __reduce_max_sync(0xffffffffu, value); }

STBLLM_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
STBLLM_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
STBLLM_DEVICE float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
/// Rounds to nearest even.
STBLLM_DEVICE uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
STBLLM_DEVICE uint16_t float_to_bfloat16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

/// Byte i of the result is byte `selector` nibble i of {b, a}; a nibble with bit 3 set replicates that byte's
/// sign.
STBLLM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;  // not __byte_perm, which does not promise the sign mode
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

/// 16 bytes from global to shared memory (zeros when not `valid`), complete when its group was waited for.
STBLLM_DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
STBLLM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits for this thread's copies, all groups but the newest `kPending`.
template <int kPending>
STBLLM_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8 x 8 matrices of halves from shared memory. Lane 8 i + r gives the address of row r of matrix i and
/// receives in reg[i] elements 2 (lane % 4), +1 of row lane / 4 of matrix i.
STBLLM_DEVICE void load_matrices(uint32_t (&reg)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

/// d += A B, A and B fp16: m16n8k16.
STBLLM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// d += A B, A 2:4 sparse, fp16: m16n8k32.
template <int kSelector>
STBLLM_DEVICE void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                              uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
        "n"(kSelector));
}

#else  // the same on the CPU

inline int thread_index() { return simt::Block::current()->thread_index(); }
inline int block_x() { return simt::Block::current()->index().x; }
inline int block_y() { return simt::Block::current()->index().y; }
inline std::byte* shared_memory() { return simt::Block::current()->shared(); }
inline void sync_threads() { simt::Block::current()->barrier("sync_threads"); }
inline void sync_warp() {
  simt::Block::current()->collective<int>("sync_warp", 0, [](const int* const*, int* const*) {});
}
inline uint32_t warp_max(uint32_t value) {
  return simt::Block::current()->collective<uint32_t>("warp_max", value,
                                                      [](const uint32_t* const* in, uint32_t* const* out) {
                                                        uint32_t largest = 0;
                                                        for (int lane = 0; lane < 32; ++lane)
                                                          largest = std::max(largest, *in[lane]);
                                                        for (int lane = 0; lane < 32; ++lane)
                                                          *out[lane] = largest;
                                                      });
}

inline uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
inline float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }
using stbllm::float_to_bfloat16;
using stbllm::float_to_half;
using stbllm::half_to_float;

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15u;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7u))) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

inline void copy_async_16(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    throw std::logic_error("copy_async_16: an address is not a multiple of 16");
  simt::Block::current()->copy_async(shared, global, valid ? 16 : 0, valid ? 0 : 16);
}
inline void commit_copies() { simt::Block::current()->commit_copies(); }
template <int kPending>
void wait_copies() {
  simt::Block::current()->wait_copies(kPending);
}

inline void load_matrices(uint32_t (&reg)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw std::logic_error("load_matrices: a row does not start at a multiple of 16");
  const Words4 words = simt::Block::current()->collective<Words4>(
      "load_matrices", row, [](const void* const* const* in, Words4* const* out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i)
            std::memcpy(&out[lane]->word[i],
                        static_cast<const std::byte*>(*in[8 * i + lane / 4]) + 4 * (lane % 4), 4);
      });
  std::copy_n(words.word, 4, reg);
}

namespace model {

struct Operands {
  float d[4];
  uint32_t a[4], b[4], metadata;
};
struct Result {
  float d[4];
};

inline float half_of(uint32_t pair, int half) {
  return stbllm::half_to_float(static_cast<uint16_t>(pair >> (16 * half)));
}

/// The A operand spread over all K columns; the columns a sparse row does not keep are never multiplied.
struct Spread {
  float value[16][32] = {};
  bool kept[16][32] = {};
};

/// d = A B + d of a whole warp, K = 16 or 32.
inline void multiply(const Operands* const* in, Result* const* out, const Spread& a, int k_size) {
  float b[32][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < k_size / 8; ++reg)
      for (int half = 0; half < 2; ++half) {
        const Element e = b_element(lane, reg, half);
        b[e.row][e.col] = half_of(in[lane]->b[reg], half);
      }
    for (int i = 0; i < 4; ++i) d[d_element(lane, i).row][d_element(lane, i).col] = in[lane]->d[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < k_size; ++k)
      if (a.kept[row][k])
        for (int n = 0; n < 8; ++n) d[row][n] += a.value[row][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) out[lane]->d[i] = d[d_element(lane, i).row][d_element(lane, i).col];
}

}  // namespace model

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const model::Operands operands = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1, 0, 0}, 0};
  const auto result = simt::Block::current()->collective<model::Result>(
      "mma", operands, [](const model::Operands* const* in, model::Result* const* out) {
        model::Spread spread;
        for (int lane = 0; lane < 32; ++lane)
          for (int reg = 0; reg < 4; ++reg)
            for (int half = 0; half < 2; ++half) {
              const Element e = a_element(lane, reg, half);
              spread.value[e.row][e.col] = model::half_of(in[lane]->a[reg], half);
              spread.kept[e.row][e.col] = true;
            }
        model::multiply(in, out, spread, 16);
      });
  std::copy_n(result.d, 4, d);
}

template <int kSelector>
void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  const model::Operands operands = {
      {d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata};
  const auto result = simt::Block::current()->collective<model::Result>(
      kSelector == 0 ? "mma_sparse<0>" : "mma_sparse<1>", operands,
      [](const model::Operands* const* in, model::Result* const* out) {
        model::Spread spread;
        for (int lane = 0; lane < 32; ++lane)
          for (int reg = 0; reg < 4; ++reg)
            for (int half = 0; half < 2; ++half) {
              const Element e = a_element(lane, reg, half);
              const int q = e.col / 2;
              const MetadataSlot slot = metadata_slot(kSelector, e.row, q);
              const uint32_t bits = in[slot.lane]->metadata >> slot.shift & 15u;
              if ((bits & 3u) >= bits >> 2)
                throw std::logic_error("mma_sparse: the kept positions of a group do not ascend");
              const uint32_t col = 4 * q + (bits >> (2 * half) & 3u);
              spread.value[e.row][col] = model::half_of(in[lane]->a[reg], half);
              spread.kept[e.row][col] = true;
            }
        model::multiply(in, out, spread, 32);
      });
  std::copy_n(result.d, 4, d);
}

#endif

}  // namespace stbllm::cuda
