// NEON, which every 64-bit ARM processor has.
//
// A table look-up (tbl) answers 16 rows with one byte of an entry, and its tables have 16 entries: codes
// become nibbles, two columns each (one column with two or three levels). Sums of entries are 16-bit numbers.
// Of their high bytes only the lowest 8 bits matter, so that these are added as bytes, and only the low bytes
// are widened. Two nibbles of 64 rows take 16 look-ups, 24 additions, 8 instructions to split them and 4
// loads of two registers each: 256 weights in 13 cycles of four 128-bit units with one level, half as many
// with more. That is counted and not measured: the tests run in an emulator.

#include <arm_neon.h>

#include "plain_loops.h"

namespace stbllm::cpu {
namespace {

// --- lookups ---

constexpr int kEntries = 16, kTableBytes = 2 * kEntries;
constexpr int kRegisterRows = 16, kParts = kTileRows / kRegisterRows;

bool can_look_up(CodeForm form, int entries) { return form == CodeForm::kNibbles && entries == kEntries; }

// The indices of two groups for 16 rows.
struct Indices {
  uint8x16_t even, odd;
};
STBLLM_INLINE Indices read_indices(const uint8_t* codes) {
  const uint8x16_t bytes = vld1q_u8(codes);
  return {vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4)};
}

// Sums of entries for 16 rows: low + 256 * high, modulo 2^16.
struct Sums {
  uint16x8_t low[2];
  uint8x16_t high;
};

STBLLM_INLINE void add_entries(const uint8_t* table, uint8x16_t index, Sums& sums) {
  const uint8x16_t low = vqtbl1q_u8(vld1q_u8(table), index);
  sums.low[0] = vaddw_u8(sums.low[0], vget_low_u8(low));
  sums.low[1] = vaddw_high_u8(sums.low[1], low);
  sums.high = vaddq_u8(sums.high, vqtbl1q_u8(vld1q_u8(table + kEntries), index));
}

// y[0..3] += step * scale * words
STBLLM_INLINE void add_scaled(int16x4_t words, const float* scale, float step, float* y) {
  const float32x4_t sum = vcvtq_f32_s32(vmovl_s16(words));
  vst1q_f32(y, vfmaq_f32(vld1q_f32(y), sum, vmulq_n_f32(vld1q_f32(scale), step)));
}

// y[0..15] += step * scale * sums
STBLLM_INLINE void add_scaled(const Sums& sums, const float* scale, float step, float* y) {
  const uint8x16_t zero = vdupq_n_u8(0);
  const uint8x16_t high[2] = {vzip1q_u8(zero, sums.high), vzip2q_u8(zero, sums.high)};
  for (int half = 0; half < 2; ++half, scale += 8, y += 8) {
    const int16x8_t words =
        vreinterpretq_s16_u16(vaddq_u16(sums.low[half], vreinterpretq_u16_u8(high[half])));
    add_scaled(vget_low_s16(words), scale, step, y);
    add_scaled(vget_high_s16(words), scale + 4, step, y + 4);
  }
}

// Looks up a tile's chunk in one set of tables. `y` begins at the tile.
void look_up_tile(const MatrixView& m, const uint8_t* codes, const uint8_t* tables, const float* scales,
                  float step, float* y) {
  Sums sums[kParts];
  for (Sums& part : sums) part = {{vdupq_n_u16(0), vdupq_n_u16(0)}, vdupq_n_u8(0)};
  for (int g = 0; g < kChunkColumns / m.group; g += 2, codes += kTileRows, tables += 2 * kTableBytes)
    for (int part = 0; part < kParts; ++part) {
      const Indices index = read_indices(codes + part * kRegisterRows);
      add_entries(tables, index.even, sums[part]);
      add_entries(tables + kTableBytes, index.odd, sums[part]);
    }
  for (int part = 0; part < kParts; ++part)
    add_scaled(sums[part], scales + part * kRegisterRows, step, y + part * kRegisterRows);
}

void look_up(const MatrixView& m, const LookupPass& pass) {
  const int64_t set_bytes = kChunkColumns / m.group * kTableBytes;
  float scales[kMaxSlots][kTileRows];
  for (int64_t tile = pass.first_tile; tile < pass.last_tile; ++tile) {
    const uint8_t* codes = m.codes + (pass.chunk * m.tiles + tile) * m.chunk_bytes;
    for (int sum = 0; sum < m.sums; ++sum)
      load_sum_scales(m, tile, pass.chunk / m.chunks_per_block, sum, scales[sum]);
    for (int64_t set = 0; set < pass.sets; ++set) {
      const auto [token, sum] = place_of(m, set);
      look_up_tile(m, codes, pass.tables + set * set_bytes, scales[sum], pass.steps[set],
                   pass.y + token * pass.y_stride + tile * kTileRows);
    }
  }
}

void tabulate(const MatrixView& m, int sum, const float* x, uint8_t* tables, float* step) {
  *step = step_of(bound_of_chunk(m, x));
  const float inverse = *step == *step ? 1.0f / *step : 0.0f;
  int16_t integers[kMaxLevels][kChunkColumns];
  for (int level = 0; level < m.levels; ++level)
    for (int c = 0; c < kChunkColumns; c += 4) {
      const float32x4_t scaled =
          vmulq_n_f32(vmulq_n_f32(vld1q_f32(x + c), m.level_worth[sum][level]), inverse);
      vst1_s16(&integers[level][c], vqmovn_s32(vcvtnq_s32_f32(scaled)));
    }
  int16_t signs[kMaxLevels][kEntries];
  signs_of_entries(m, signs);
  for (int g = 0; g < kChunkColumns / m.group; ++g) {
    int16x8_t entries[2] = {vdupq_n_s16(0), vdupq_n_s16(0)};
    for (int level = 0; level < m.levels; ++level)
      for (int c = 0; c < m.group; ++c)
        for (int half = 0; half < 2; ++half)
          entries[half] = vmlaq_n_s16(entries[half], vld1q_s16(signs[level * m.group + c] + 8 * half),
                                      integers[level][g * m.group + c]);
    const uint8x16_t first = vreinterpretq_u8_s16(entries[0]), second = vreinterpretq_u8_s16(entries[1]);
    vst1q_u8(tables + g * kTableBytes, vuzp1q_u8(first, second));
    vst1q_u8(tables + g * kTableBytes + kEntries, vuzp2q_u8(first, second));
  }
}

// --- panels ---

void decode(const MatrixView& m, int64_t tile, int64_t chunk, float* panel) {
  int8_t symbols[kChunkColumns][kTileRows];
  if (m.form == CodeForm::kPlane) {
    decode_plane(m, tile, chunk, symbols);
  } else if (m.form == CodeForm::kRows) {
    decode_rows(m, tile, chunk, symbols);
  } else {
    // The symbol of a column is the low byte of the dot product with its unit vector.
    const uint8_t* codes = m.codes + (chunk * m.tiles + tile) * m.chunk_bytes;
    for (int g = 0; g < kChunkColumns / m.group; g += 2, codes += kTileRows)
      for (int row = 0; row < kTileRows; row += kRegisterRows) {
        const Indices index = read_indices(codes + row);
        for (int c = 0; c < m.group; ++c) {
          const uint8x16_t table = vld1q_u8(m.unit_tables + c * kTableBytes);
          vst1q_s8(symbols[g * m.group + c] + row, vreinterpretq_s8_u8(vqtbl1q_u8(table, index.even)));
          vst1q_s8(symbols[(g + 1) * m.group + c] + row, vreinterpretq_s8_u8(vqtbl1q_u8(table, index.odd)));
        }
      }
  }
  scale_symbols(m, tile, chunk, symbols, panel);
}

// Thirty-two registers: 4 times 4 of sums (rows of the tile by tokens), 4 of weights, the others for
// activations.
constexpr int kPassTokens = 4, kPassVectors = 4, kPassRows = 4 * kPassVectors;

template <int Tokens>
void multiply_tokens(const float* panel, int64_t columns, const float* x, float* y, int64_t y_stride) {
  float32x4_t sums[Tokens][kPassVectors];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kPassVectors; ++v) sums[t][v] = vld1q_f32(y + t * y_stride + 4 * v);
  for (int64_t c = 0; c < columns; ++c) {
    float32x4_t weights[kPassVectors];
    for (int v = 0; v < kPassVectors; ++v) weights[v] = vld1q_f32(panel + c * kTileRows + 4 * v);
    for (int t = 0; t < Tokens; ++t) {
      const float32x4_t activation = vld1q_dup_f32(x + t * columns + c);
      for (int v = 0; v < kPassVectors; ++v) sums[t][v] = vfmaq_f32(sums[t][v], activation, weights[v]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < kPassVectors; ++v) vst1q_f32(y + t * y_stride + 4 * v, sums[t][v]);
}

void multiply(const float* panel, int64_t columns, const float* x, int64_t tokens, float* y,
              int64_t y_stride) {
  for (int row = 0; row < kTileRows; row += kPassRows)
    in_token_passes<kPassTokens>(tokens, [&](int64_t t, auto count) {
      multiply_tokens<count>(panel + row, columns, x + t * columns, y + t * y_stride + row, y_stride);
    });
}

}  // namespace

constinit const Kernels kNeonKernels = {
    .name = "cpu-neon",
    .can_look_up = can_look_up,
    .decode = decode,
    .decode_apart = decode_apart,
    .multiply = multiply,
    .integers = nullptr,
    .bfloat16 = nullptr,
    .multiply_rows = multiply_rows,
    .tabulate = tabulate,
    .look_up = look_up,
    .load_floats = load_floats,
    .store_floats = store_floats,
};

}  // namespace stbllm::cpu
