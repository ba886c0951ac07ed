#pragma once
// Asks the device whether fragments.h tells the truth: every element of A, one at a time, against a B whose
// elements are all different, and for mma.sp every row, four columns, support and selector. Run it before
// anything else on a new kind of device.

#include "ptx.cuh"

namespace stbllm::cuda {

inline constexpr int kDenseProbes = 16 * 16;              // row, column
inline constexpr int kSparseProbes = 2 * 16 * 8 * 6 * 2;  // selector, row, four, support, kept value

/// One warp. *mismatches: probes with a wrong result; *first: the lowest of them, dense probes before sparse
/// ones.
STBLLM_DEVICE void probe(int* mismatches, int* first) {
  const int lane = thread_index();
  constexpr uint32_t kOne = 0x3c00;  // fp16
  // Up to 256, which is exact in fp16.
  const auto b_value = [](int k, int n) { return static_cast<float>(1 + 8 * k + n); };
  uint32_t b[4];
  for (int reg = 0; reg < 4; ++reg) {
    const Element low = b_element(lane, reg, 0), high = b_element(lane, reg, 1);
    b[reg] = static_cast<uint32_t>(float_to_half(b_value(low.row, low.col))) |
             static_cast<uint32_t>(float_to_half(b_value(high.row, high.col))) << 16;
  }
  const auto one_hot = [&](uint32_t(&a)[4], int row, int column) {
    for (int reg = 0; reg < 4; ++reg) {
      a[reg] = 0;
      for (int half = 0; half < 2; ++half) {
        const Element e = a_element(lane, reg, half);
        if (e.row == row && e.col == column) a[reg] |= kOne << (16 * half);
      }
    }
  };
  int wrong = 0, lowest = -1;
  // Row `row` of D must be row `k` of B, all others zero.
  const auto check = [&](const float(&d)[4], int row, int k, int index) {
    uint32_t differs = 0;
    for (int i = 0; i < 4; ++i) {
      const Element e = d_element(lane, i);
      if (d[i] != (e.row == row ? b_value(k, e.col) : 0.0f)) differs = 1;
    }
    if (warp_max(differs) != 0) {
      if (wrong++ == 0) lowest = index;
    }
  };

  for (int index = 0; index < kDenseProbes; ++index) {
    const int row = index / 16, column = index % 16;
    uint32_t a[4];
    float d[4] = {};
    one_hot(a, row, column);
    mma(d, a, b[0], b[1]);
    check(d, row, column, index);
  }
  for (int index = 0; index < kSparseProbes; ++index) {
    const int half = index % 2, support = index / 2 % 6, q = index / 12 % 8, row = index / 96 % 16;
    const int selector = index / 1536;
    const int high = support < 1 ? 1 : support < 3 ? 2 : 3, low = support - high * (high - 1) / 2;
    // Lanes that should not be read say positions 2 and 3, those that should 0 and 1 but for the one probed.
    uint32_t metadata = lane % 4 / 2 == selector ? 0x44444444u : 0xeeeeeeeeu;
    const MetadataSlot slot = metadata_slot(selector, row, q);
    if (lane == slot.lane)
      metadata = (metadata & ~(15u << slot.shift)) | static_cast<uint32_t>(low | high << 2) << slot.shift;
    uint32_t a[4];
    float d[4] = {};
    one_hot(a, row, 2 * q + half);
    if (selector == 0)
      mma_sparse<0>(d, a, b, metadata);
    else
      mma_sparse<1>(d, a, b, metadata);
    check(d, row, 4 * q + (half == 0 ? low : high), kDenseProbes + index);
  }
  if (lane == 0) {
    *mismatches = wrong;
    *first = lowest;
  }
}

}  // namespace stbllm::cuda
