// Plain C++ for any machine: decode a tile, multiply, no lookups.

#include "plain_loops.h"

namespace stbllm::cpu {
namespace {

bool can_look_up(CodeForm, int) { return false; }

void decode(const MatrixView& m, int64_t tile, int64_t chunk, float* panel) {
  int8_t symbols[kChunkColumns][kTileRows];
  m.form == CodeForm::kRows ? decode_rows(m, tile, chunk, symbols) : decode_plane(m, tile, chunk, symbols);
  scale_symbols(m, tile, chunk, symbols, panel);
}

void multiply(const float* panel, int64_t columns, const float* x, int64_t tokens, float* y,
              int64_t y_stride) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < columns; ++c)
      for (int r = 0; r < kTileRows; ++r)
        y[t * y_stride + r] += x[t * columns + c] * panel[c * kTileRows + r];
}

}  // namespace

constinit const Kernels kGenericKernels = {
    .name = "cpu-generic",
    .can_look_up = can_look_up,
    .decode = decode,
    .decode_apart = decode_apart,
    .multiply = multiply,
    .integers = nullptr,
    .bfloat16 = nullptr,
    .multiply_rows = multiply_rows,
    .tabulate = nullptr,
    .look_up = nullptr,
    .load_floats = load_floats,
    .store_floats = store_floats,
};

}  // namespace stbllm::cpu
