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
#include <array>
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

/// Where the caller stands: threads meet only there.
using Place = simt::Place;

inline void sync_threads(Place place = Place::current()) {
  simt::Block::current()->barrier({"sync_threads", place});
}
inline void sync_warp(Place place = Place::current()) {
  simt::Block::current()->collective<int>({"sync_warp", place}, 0, [](const int* const*, int* const*) {});
}
inline uint32_t warp_max(uint32_t value, Place place = Place::current()) {
  return simt::Block::current()->collective<uint32_t>({"warp_max", place}, value,
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

inline void load_matrices(uint32_t (&reg)[4], const void* row, Place place = Place::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw std::logic_error("load_matrices: a row does not start at a multiple of 16");
  const Words4 words = simt::Block::current()->collective<Words4>(
      {"load_matrices", place}, row, [](const void* const* const* in, Words4* const* out) {
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i)
            std::memcpy(&out[lane]->word[i],
                        static_cast<const std::byte*>(*in[8 * i + lane / 4]) + 4 * (lane % 4), 4);
      });
  std::copy_n(words.word, 4, reg);
}

/// Written from the tables of the PTX ISA manual and not from fragments.h, which the kernels use: a mistake
/// in one of them shows. The manual calls a lane's elements a0, a1, .. in the order of its registers, lane /
/// 4 its group and lane % 4 its thread in the group.
namespace model {

struct Operands {
  float d[4];
  uint32_t a[4], b[4], metadata;
};
struct Result {
  float d[4];
};

/// Element i of a fragment.
inline float element(const uint32_t* registers, int i) {
  return stbllm::half_to_float(static_cast<uint16_t>(registers[i / 2] >> (16 * (i % 2))));
}

/// A over all K columns; the columns that a sparse row does not keep are never multiplied.
struct Spread {
  float value[16][32] = {};
  bool kept[16][32] = {};

  void set(int row, int col, float x) {
    value[row][col] = x;
    kept[row][col] = true;
  }
};

/// d = A B + d of a whole warp, K = 16 or 32.
inline void multiply(const Operands* const* in, Result* const* out, const Spread& a, int k_size) {
  float b[32][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane & 3;
    for (int i = 0; i < k_size / 4; ++i)
      b[(i & ~1) * 4 + thread * 2 + (i & 1)][group] = element(in[lane]->b, i);
    for (int i = 0; i < 4; ++i) d[i < 2 ? group : group + 8][thread * 2 + (i & 1)] = in[lane]->d[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < k_size; ++k)
      if (a.kept[row][k])
        for (int n = 0; n < 8; ++n) d[row][n] += a.value[row][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, thread = lane & 3;
    for (int i = 0; i < 4; ++i) out[lane]->d[i] = d[i < 2 ? group : group + 8][thread * 2 + (i & 1)];
  }
}

/// The row of a_i, in the dense and in the sparse operand.
inline int row_of_a(int group, int i) { return i < 2 || (i >= 4 && i < 6) ? group : group + 8; }

/// The kept positions of the sparse operand: [row][four columns], four bits each. A word of metadata holds
/// eight, those of 16 columns of a row and then of the row eight below. Two lanes of each group give theirs.
using Positions = std::array<std::array<uint32_t, 8>, 16>;
inline Positions positions_of(const Operands* const* in, int selector) {
  Positions positions;
  for (int group = 0; group < 8; ++group)
    for (int which = 0; which < 2; ++which) {
      uint32_t word = in[group * 4 + selector * 2 + which]->metadata;
      for (const int row : {group, group + 8})
        for (int four = 0; four < 4; ++four, word >>= 4) positions[row][which * 4 + four] = word & 15u;
    }
  return positions;
}

}  // namespace model

inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                Place place = Place::current()) {
  const model::Operands operands = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1, 0, 0}, 0};
  const auto result = simt::Block::current()->collective<model::Result>(
      {"mma", place}, operands, [](const model::Operands* const* in, model::Result* const* out) {
        model::Spread spread;
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 8; ++i)
            spread.set(model::row_of_a(lane >> 2, i), (lane & 3) * 2 + (i & 1) + (i < 4 ? 0 : 8),
                       model::element(in[lane]->a, i));
        model::multiply(in, out, spread, 16);
      });
  std::copy_n(result.d, 4, d);
}

template <int kSelector>
void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                Place place = Place::current()) {
  const model::Operands operands = {
      {d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata};
  const auto result = simt::Block::current()->collective<model::Result>(
      {kSelector == 0 ? "mma_sparse<0>" : "mma_sparse<1>", place}, operands,
      [](const model::Operands* const* in, model::Result* const* out) {
        const model::Positions positions = model::positions_of(in, kSelector);
        model::Spread spread;
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 8; ++i) {
            const int row = model::row_of_a(lane >> 2, i);
            const int first_col = (lane & 3) * 4 + (i < 4 ? 0 : 16);
            const uint32_t kept = positions[row][first_col / 4];
            if ((kept & 3u) >= kept >> 2)
              throw std::logic_error("mma_sparse: the kept positions of a group do not ascend");
            spread.set(row, first_col + static_cast<int>(i & 1 ? kept >> 2 : kept & 3u),
                       model::element(in[lane]->a, i));
          }
        model::multiply(in, out, spread, 32);
      });
  std::copy_n(result.d, 4, d);
}

#endif

}  // namespace stbllm::cuda
