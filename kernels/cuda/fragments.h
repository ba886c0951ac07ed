#pragma once
// Which lane of a warp holds which element of a matrix tile: the register fragments of `mma.sync` m16n8k16
// and `mma.sp` m16n8k32 with 16-bit inputs and f32 accumulators, from the PTX ISA manual, "Warp-level matrix
// instructions".   D (16 x 8) = A (16 x K) B (K x 8) + D
//
// In every fragment four neighbouring lanes share a row of A and D (a column of B): lane = 4 * group +
// member. probe.cuh checks all of this on a real device, one element and one metadata value at a time.

#ifdef __CUDACC__
#define STBLLM_HOST_DEVICE __host__ __device__
#else
#define STBLLM_HOST_DEVICE
#endif

namespace stbllm::cuda {

struct Element {
  int row, col;
  bool operator==(const Element&) const = default;
};

/// A of m16n8k16: four registers of two halves. A of the sparse m16n8k32 is the same picture over the *kept*
/// values: `col` 2 q and 2 q + 1 are the two values kept of columns 4 q .. 4 q + 3.
STBLLM_HOST_DEVICE constexpr Element a_element(int lane, int reg, int half) {
  return {lane / 4 + 8 * (reg % 2), 2 * (lane % 4) + 8 * (reg / 2) + half};
}

/// B: two registers for K = 16, four for K = 32. `row` is k, `col` is n.
STBLLM_HOST_DEVICE constexpr Element b_element(int lane, int reg, int half) {
  return {2 * (lane % 4) + 8 * reg + half, lane / 4};
}

/// D: four floats.
STBLLM_HOST_DEVICE constexpr Element d_element(int lane, int index) {
  return {lane / 4 + 8 * (index / 2), 2 * (lane % 4) + index % 2};
}

/// Where the sparse m16n8k32 takes the two kept positions of columns 4 q .. 4 q + 3 of `row` from: four bits,
/// the lower position in the lower two. Selector 0 reads the metadata words of members 0 and 1 of each group
/// of four lanes, selector 1 those of members 2 and 3.
struct MetadataSlot {
  int lane, shift;
  bool operator==(const MetadataSlot&) const = default;
};
STBLLM_HOST_DEVICE constexpr MetadataSlot metadata_slot(int selector, int row, int q) {
  return {4 * (row % 8) + 2 * selector + q / 4, 16 * (row / 8) + 4 * (q % 4)};
}

}  // namespace stbllm::cuda
