// AVX2, FMA and F16C: decode a tile, multiply with 12 registers of sums, no lookups.

#include <immintrin.h>

#include "plain_loops.h"

namespace stbllm::cpu {
namespace {

bool can_look_up(CodeForm, int) { return false; }

void decode(const MatrixView& m, int64_t tile, int64_t chunk, float* panel) {
  int8_t symbols[kChunkColumns][kTileRows];
  decode_plane(m, tile, chunk, symbols);
  scale_symbols(m, tile, chunk, symbols, panel);
}

// Registers: 2 of a tile's rows x 6 tokens of sums, 2 of weights, 1 broadcast activation.
constexpr int kPassTokens = 6, kPassRows = 16;

template <int Tokens>
void multiply_tokens(const float* panel, int64_t columns, const float* x, float* y, int64_t y_stride) {
  __m256 sums[Tokens][2];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 2; ++v) sums[t][v] = _mm256_loadu_ps(y + t * y_stride + 8 * v);
  for (int64_t c = 0; c < columns; ++c) {
    const __m256 weights[2] = {_mm256_load_ps(panel + c * kTileRows),
                               _mm256_load_ps(panel + c * kTileRows + 8)};
    for (int t = 0; t < Tokens; ++t) {
      const __m256 activation = _mm256_broadcast_ss(x + t * columns + c);
      for (int v = 0; v < 2; ++v) sums[t][v] = _mm256_fmadd_ps(activation, weights[v], sums[t][v]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 2; ++v) _mm256_storeu_ps(y + t * y_stride + 8 * v, sums[t][v]);
}

void multiply(const float* panel, int64_t columns, const float* x, int64_t tokens, float* y,
              int64_t y_stride) {
  for (int row = 0; row < kTileRows; row += kPassRows) {
    int64_t t = 0;
    for (; t + kPassTokens <= tokens; t += kPassTokens)
      multiply_tokens<kPassTokens>(panel + row, columns, x + t * columns, y + t * y_stride + row, y_stride);
    for (; t < tokens; ++t)
      multiply_tokens<1>(panel + row, columns, x + t * columns, y + t * y_stride + row, y_stride);
  }
}

}  // namespace

constinit const Kernels kAvx2Kernels = {
    .name = "cpu-avx2",
    .can_look_up = can_look_up,
    .decode = decode,
    .decode_outliers = decode_outliers,
    .multiply = multiply,
    .round_panel = nullptr,
    .multiply_bf16 = nullptr,
    .tabulate = nullptr,
    .look_up = nullptr,
    .load_floats = load_floats,
    .store_floats = store_floats,
};

}  // namespace stbllm::cpu
