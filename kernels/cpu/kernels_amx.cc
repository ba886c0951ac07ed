// Tiles of AMX (AMX-TILE, AMX-BF16), beside the kernels for AVX-512.
//
// One instruction adds the products of 16 tokens, 32 columns and 16 rows to a tile of float32 sums. A core of
// an Emerald Rapids processor does 3.3 TFLOP/s that way, nine times what vpdpwssd reaches there. Loading
// tiles and scaling the sums once per chunk then takes longer than multiplying: tiles go by two and two, so
// that each one that is loaded serves twice.
//
// The system hands out the registers on demand (missing_cpu_feature() asks for them). Their layout belongs to
// one call, so that other libraries find none of ours.

#include <immintrin.h>

#include "kernels.h"

namespace stbllm::cpu {
namespace {

constexpr int kTileTokens = 16, kTileColumns = 32, kTileSums = 16;  // of one register

// What ldtilecfg reads. All tiles are as large as they can be.
struct alignas(64) TileLayout {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// A constant in memory: g++ 12 believes that the instruction reads the first eight bytes only, and would
// leave the others of a local variable out.
constexpr TileLayout kTileLayout;

// Tiles 0..3 are sums, (tokens / 16, rows / 16); 4 and 5 activations; 6 and 7 weights.
// Adds 16 tokens, or 32 with Both, times 32 rows of the panel to `sums`, (tokens, 32).
template <bool Both>
inline __attribute__((always_inline)) void multiply_block(const uint16_t* x, int64_t columns,
                                                          const uint16_t* panel, float* sums) {
  const auto x_stride = static_cast<size_t>(2 * columns);
  constexpr size_t kPanelStride = 4 * kTileRows, kSumStride = 2 * kTileSums * sizeof(float);
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Both) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t c = 0; c < columns; c += kTileColumns) {
    const uint16_t* const weights = panel + c * kTileRows;
    _tile_loadd(4, x + c, x_stride);
    _tile_loadd(6, weights, kPanelStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + 2 * kTileSums, kPanelStride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Both) {
      _tile_loadd(5, x + kTileTokens * columns + c, x_stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kTileSums, kSumStride);
  if constexpr (Both) {
    _tile_stored(2, sums + 2 * kTileTokens * kTileSums, kSumStride);
    _tile_stored(3, sums + (2 * kTileTokens + 1) * kTileSums, kSumStride);
  }
}

// y[t][0..31] += scales[0..31] * sums[t][0..31]
inline __attribute__((always_inline)) void add_scaled(const float* sums, int tokens, const float* scales,
                                                      float* y, int64_t y_stride) {
  const __m512 scale0 = _mm512_load_ps(scales), scale1 = _mm512_load_ps(scales + 16);
  for (int t = 0; t < tokens; ++t, sums += 32, y += y_stride) {
    _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_load_ps(sums), scale0, _mm512_loadu_ps(y)));
    _mm512_storeu_ps(y + 16, _mm512_fmadd_ps(_mm512_load_ps(sums + 16), scale1, _mm512_loadu_ps(y + 16)));
  }
}

}  // namespace

void multiply_tiles(const WordPanel& weights, const WordActivations& in, float* y, int64_t y_stride) {
  _tile_loadconfig(&kTileLayout);
  alignas(64) float sums[2 * kTileTokens * 2 * kTileSums];
  for (int64_t t = 0; t < in.tokens; t += 2 * kTileTokens)
    for (int row = 0; row < kTileRows; row += 2 * kTileSums) {
      const uint16_t* const x = in.x + t * weights.columns;
      const uint16_t* const panel = weights.panel + 2 * row;
      const bool both = t + kTileTokens < in.tokens;
      if (both)
        multiply_block<true>(x, weights.columns, panel, sums);
      else
        multiply_block<false>(x, weights.columns, panel, sums);
      add_scaled(sums, both ? 2 * kTileTokens : kTileTokens, weights.scales + row, y + t * y_stride + row,
                 y_stride);
    }
  _tile_release();
}

}  // namespace stbllm::cpu
