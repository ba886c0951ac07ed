#pragma once
// From a record (device_layout.h) to A fragments. All of it is bit logic on whole register pairs:
//
//   pair = (S0 ^ (S0 ^ S1) & m0 ^ (S0 ^ S2) & m1 ^ (S0 ^ S1 ^ S2 ^ S3) & m0 & m1) ^ sign bits
//
// with S the scale of magnitude 0..3 in both halves and m0, m1 the level bits spread over their halves. That
// is two operations per pair with one magnitude, five with two, nine with up to four; a pair is four columns
// of a sparse tile, two of a dense one. Metadata words cost six operations per eight fours.

#include "device_layout.h"
#include "ptx.cuh"

namespace stbllm::cuda {

/// The metadata of eight fours (PTX order: four of fragment row g, four of row g + 8) from eight 3-bit
/// supports, those of even index in the lower four nibbles, those of odd index in the upper four.
STBLLM_DEVICE uint32_t expand_metadata(uint32_t supports) {
  // Byte i of {high, low} = low position | high position << 2 of support i; 6 and 7 do not occur.
  constexpr uint32_t kLow = 0x0c090804u, kHigh = 0x00000e0du;
  const uint32_t even = permute_bytes(kLow, kHigh, supports);
  const uint32_t odd = permute_bytes(kLow, kHigh, supports >> 16);
  return even | odd << 4;
}

/// Spreads bits 15 and 31 over their halves.
STBLLM_DEVICE uint32_t half_masks(uint32_t bits) { return permute_bytes(bits, 0, 0xbb99u); }

/// The magnitudes of fragment rows g and g + 8 in 128 columns, ready for selection.
template <int kPlanes>
struct RowScales {
  static constexpr int kMagnitudes = 1 << kPlanes;
  uint32_t base[2];  // by fragment row g + 8 h
  uint32_t flip[2][kMagnitudes > 1 ? kMagnitudes - 1 : 1];

  /// `scales`: of the record, + 8 words for the second 128 columns.
  STBLLM_DEVICE RowScales(const uint32_t* scales, int levels, int lane) {
    uint32_t value[2][kMagnitudes];
#pragma unroll
    for (int m = 0; m < kMagnitudes; ++m) {
      const uint32_t pair = m < levels ? scales[16 * m + lane / 4] : 0;
      value[0][m] = permute_bytes(pair, 0, 0x1010u);
      value[1][m] = permute_bytes(pair, 0, 0x3232u);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      base[h] = value[h][0];
      if constexpr (kPlanes >= 1) flip[h][0] = value[h][0] ^ value[h][1];
      if constexpr (kPlanes == 2) {
        flip[h][1] = value[h][0] ^ value[h][2];
        flip[h][2] = flip[h][0] ^ value[h][2] ^ value[h][3];
      }
    }
  }
};

/// What a lane knows of 64 columns of a tile: the registers of two steps of m16n8k32 or four of m16n8k16.
template <bool kSparse, int kPlanes>
class TileChunk {
 public:
  static constexpr TileFormat kFormat{kSparse, kPlanes};

  /// `chunk`: 0..3 within the record.
  STBLLM_DEVICE TileChunk(const uint32_t* record, int levels, int chunk, int lane)
      : scales_(record + 32 * kFormat.lane_words() + 8 * (chunk / 2), levels, lane) {
    const auto word = [&](int w) { return record[32 * w + lane]; };
    if constexpr (kSparse) {
      uint32_t supports;
      if (chunk < 3)
        supports = word(chunk) & 0x77777777u;
      else
        supports = (word(0) >> 3 & 0x11111111u) | (word(1) >> 2 & 0x22222222u) | (word(2) >> 1 & 0x44444444u);
      metadata_ = expand_metadata(supports);
    }
    // Planes are kept shifted left so that register pair i is 15 - i places below the sign bits.
    const int unused = kSparse ? 8 * (1 - chunk % 2) : 0;
#pragma unroll
    for (int p = 0; p <= kPlanes; ++p) {
      const int plane_word = kSparse ? chunk / 2 : chunk;
      plane_[p] = word(kFormat.support_words() + p * kFormat.plane_words() + plane_word) << unused;
    }
  }

  /// d[n] += W b[n] over columns 32 step .. of the chunk, step 0 or 1; b[n] is the B fragment of 32 rows.
  template <int kTokenTiles>
  STBLLM_DEVICE void multiply(float (&d)[kTokenTiles][4], const uint32_t (&b)[kTokenTiles][4],
                              int step) const {
    uint32_t a[4];
    if constexpr (kSparse) {
      fragment(a, 4 * step);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        if (step == 0)
          mma_sparse<0>(d[n], a, b[n], metadata_);
        else
          mma_sparse<1>(d[n], a, b[n], metadata_);
      }
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        fragment(a, 8 * step + 4 * k);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) mma(d[n], a, b[n][2 * k], b[n][2 * k + 1]);
      }
    }
  }

  /// The A registers whose first pair is `pair`.
  STBLLM_DEVICE void fragment(uint32_t (&a)[4], int pair) const {
    // A sparse chunk has 8 pairs, in the upper bits of its halves; a dense one has 16.
    const int above = (kSparse ? 7 : 15) - pair;
#pragma unroll
    for (int reg = 0; reg < 4; ++reg) {
      const int shift = above - reg, h = reg % 2;
      uint32_t value = scales_.base[h];
      if constexpr (kPlanes >= 1) {
        const uint32_t mask = half_masks(plane_[1] << shift);
        value ^= scales_.flip[h][0] & mask;
        if constexpr (kPlanes == 2) {
          const uint32_t mask2 = half_masks(plane_[2] << shift);
          value ^= scales_.flip[h][1] & mask2;
          value ^= scales_.flip[h][2] & mask & mask2;
        }
      }
      a[reg] = value ^ (plane_[0] << shift & 0x80008000u);
    }
  }
  STBLLM_DEVICE uint32_t metadata() const { return metadata_; }

 private:
  RowScales<kPlanes> scales_;
  uint32_t metadata_ = 0;
  uint32_t plane_[1 + kPlanes];
};

}  // namespace stbllm::cuda
