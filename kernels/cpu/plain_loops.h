#pragma once
// Kernels as plain loops, which each instruction set compiles for itself: everything here is static, so that
// no two files share a function. Twins of the hand-written kernels; tested like them.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"
#include "stbllm/base/bits.h"   // of it only the conversions of half precision, which are inlined always
#include "stbllm/base/lanes.h"  // inlined always

namespace stbllm::cpu {
namespace {

using Lanes = NativeLanes;

// f(0), ..., f(N - 1) with the index as a constant.
template <typename F, int... I>
STBLLM_INLINE void unroll(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, typename F>
STBLLM_INLINE void unroll(F&& f) {
  unroll(f, std::make_integer_sequence<int, N>());
}

// Calls f(first token, number of tokens as a constant): Most at a time, then the rest.
template <int Most, typename F>
STBLLM_INLINE void in_token_passes(int64_t tokens, F&& f) {
  int64_t t = 0;
  for (; t + Most <= tokens; t += Most) f(t, std::integral_constant<int, Most>());
  unroll<Most>([&](auto rest) {
    if constexpr (rest > 0)
      if (tokens - t == rest) f(t, rest);
  });
}

// --- activations ---

inline float float_of_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline uint32_t bits_of_float(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}

void load_floats(const uint16_t* from, bool half, int64_t count, float* to) {
  if (!half) {
    for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_to_float(from[i]);
    return;
  }
  const int64_t whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
#if defined(__F16C__)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#elif defined(__aarch64__)
    for (int64_t j = i; j < i + 8; j += 4)
      vst1q_f32(to + j, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + j))));
#else
    for (int64_t j = i; j < i + 8; ++j) to[j] = half_to_float(from[j]);
#endif
  }
  for (int64_t i = whole; i < count; ++i) to[i] = half_to_float(from[i]);
}

void store_floats(const float* from, bool half, int64_t count, uint16_t* to) {
  if (!half) {
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bfloat16(from[i]);
    return;
  }
  const int64_t whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
#if defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
    for (int64_t j = i; j < i + 8; j += 4)
      vst1_u16(to + j, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + j))));
#else
    for (int64_t j = i; j < i + 8; ++j) to[j] = float_to_half(from[j]);
#endif
  }
  for (int64_t i = whole; i < count; ++i) to[i] = float_to_half(from[i]);
}

// --- lookups ---

// The smallest power of two, but at least 2^-100, of which `bound` is at most 32639 multiples: 128 terms
// rounded by at most a half each still fit 16 bits. NaN when the bound is not finite.
[[maybe_unused]] float step_of(float bound) {
  const float exact = bound * (1.0f / 32639.0f);
  if (!(exact < float_of_bits(0x7f800000u))) return float_of_bits(0x7fc00000u);
  if (exact < 0x1p-100f) return 0x1p-100f;
  return float_of_bits((bits_of_float(exact) + 0x7fffffu) & 0x7f800000u);
}

// Which token and which of its sums a set of tables belongs to. A division takes as long as a part of the
// lookups, and most matrices have one sum.
struct SetPlace {
  int64_t token, sum;
};
STBLLM_INLINE SetPlace place_of(const MatrixView& m, int64_t set) {
  return m.sums == 1 ? SetPlace{set, 0} : SetPlace{set / m.sums, set % m.sums};
}

// The largest that a level counts in a table.
STBLLM_INLINE float largest_worth(const MatrixView& m) {
  float largest = m.level_worth[0][0];
  for (int l = 1; l < m.levels; ++l) largest = m.level_worth[0][l] > largest ? m.level_worth[0][l] : largest;
  return largest;
}

// An upper bound of the sum over groups of the largest contribution of any state: the `keep` largest
// magnitudes of a group are at most their sum and at most `keep` times the largest. NaN and infinity
// propagate.
[[maybe_unused]] float bound_of_chunk(const MatrixView& m, const float* x) {
  float bound = 0, all = 0;
  for (int first = 0; first < kChunkColumns; first += m.file_group) {
    float sum = 0, largest = 0;
    for (int c = first; c < first + m.file_group; ++c) {
      const float magnitude = __builtin_fabsf(x[c]);
      sum += magnitude;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float most = static_cast<float>(m.file_keep) * largest;
    bound += sum < most ? sum : most;
    all += sum;
  }
  return bound * largest_worth(m) + 0.0f * all;
}

// Whether an entry of a table of 16 adds (1) or subtracts (-1) each of its sources, the columns, or the
// levels of one column: signs[source][entry].
[[maybe_unused]] void signs_of_entries(const MatrixView& m, int16_t (*signs)[16]) {
  std::memset(signs, 0, sizeof *signs * static_cast<size_t>(m.group * m.levels));
  for (int k = 0; k < m.term_count; ++k)
    for (int entry = 0; entry < 16; ++entry)
      if (const int source = m.terms[k * 16 + entry]; source % kNegative != kNoSource)
        signs[source % kNegative][entry] = source < kNegative ? 1 : -1;
}

// What one sum of a tile is multiplied by, without row scales.
[[maybe_unused]] void load_sum_scales(const MatrixView& m, int64_t tile, int64_t block, int64_t sum,
                                      float* scales) {
  const int64_t rows = m.tiles * kTileRows, row = tile * kTileRows;
  if (m.half_scales != nullptr)
    return load_floats(m.half_scales + (block * m.slots + sum) * rows + row, true, kTileRows, scales);
  for (int r = 0; r < kTileRows; ++r) scales[r] = m.factors[m.scale_codes[block * rows + row + r]];
}

// --- integers of 16 bits ---

// WordKernels::arrange. Sums of 128 products fit 31 bits: a single level is 1, an integer of kRows has 8
// bits, the largest of several levels has at most 13, and activations are then at most 2^18 together. 32639
// is what step_of() leaves of 2^15.
[[maybe_unused]] void to_integers(const MatrixView& m, const float* x, uint16_t* to, float* step) {
  Lanes sum = {}, largest = {};
  for (int64_t c = 0; c < m.chunk_columns; c += kLanes) {
    const Lanes magnitude = magnitude_of(load_lanes<Lanes>(x + c));
    largest = select(magnitude > largest, magnitude, largest);
    sum += magnitude;
  }
  const float all = sum_of(sum);
  const float most = largest_of(largest);
  const float bound = m.levels > 1 && all / 8 > most ? all / 8 : most;
  *step = step_of(bound + 0.0f * all);  // NaN where a sum is not finite
  const float inverse = *step == *step ? 1.0f / *step : 0.0f;
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the rounded number in the lowest bits
  for (int64_t c = 0; c < m.chunk_columns; c += kLanes) {
    const Lanes shifted = load_lanes<Lanes>(x + c) * inverse + kRound;
    store_short_lanes(reinterpret_cast<int16_t*>(to + c), bits_as<int32_t>(shifted));
  }
}

// The scales of WordKernels::decode for panels of integers.
[[maybe_unused]] void integer_scales(const MatrixView& m, int64_t tile, int64_t chunk, int sum,
                                     float* scales) {
  load_sum_scales(m, tile, chunk / m.chunks_per_block, sum, scales);
  const float unit = m.form == CodeForm::kRows ? 1.0f : m.integer_unit;
  const float level = m.levels == 1 ? m.level[0] : 1.0f;
  for (int r = 0; r < kTileRows; ++r)
    scales[r] *= m.row_scales == nullptr ? unit : unit * level * m.row_scales[tile * kTileRows + r];
}

// --- decoding ---

// scales[row] of a tile in one slot.
inline void slot_scales(const MatrixView& m, int64_t tile, int64_t block, int slot, float* scales) {
  const int64_t rows = m.tiles * kTileRows, first = tile * kTileRows;
  if (m.half_scales != nullptr)
    return load_floats(m.half_scales + (block * m.slots + slot) * rows + first, true, kTileRows, scales);
  const uint8_t* codes = m.scale_codes + block * rows + first;
  for (int r = 0; r < kTileRows; ++r)
    scales[r] = m.row_scales[first + r] * m.factors[codes[r]] * m.level[slot];
}

// n / d.value where n * d.value < 2^63: the reciprocal is rounded down, and n + 1 makes up for it.
inline uint64_t quotient(uint64_t n, const Divisor& d) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint64_t>((Wide{n} + 1) * d.reciprocal >> 64);
}

// The groups of a tile's chunk that exist, and where a row's first code starts.
struct PlaneChunk {
  int64_t rows, groups, first_bit;
};
inline PlaneChunk plane_chunk(const MatrixView& m, int64_t tile, int64_t chunk) {
  const int64_t rows = m.rows - tile * kTileRows, first_group = chunk * m.chunk_columns / m.group;
  const int64_t groups = m.chunk_columns / m.group, rest = (m.cols + m.group - 1) / m.group - first_group;
  return {rows < kTileRows ? rows : kTileRows, groups < rest ? groups : rest, first_group * m.code_bits};
}

// A code taken apart: indices of `expand` and, for the first and the next eight kept weights, of
// `magnitudes`.
struct PlaneCode {
  uint64_t signs, rank, low_digits, high_digits;
};
inline PlaneCode read_plane_code(const MatrixView& m, const uint8_t* stream, int64_t bit) {
  uint64_t code;
  std::memcpy(&code, stream + (bit >> 3), sizeof code);
  code = code >> (bit & 7) & ((uint64_t{1} << m.code_bits) - 1);
  const uint64_t rest = code >> m.keep, rank = quotient(rest, m.digit_states);
  const uint64_t digits = rest - rank * m.digit_states.value;
  const uint64_t high = m.keep <= 8 ? 0 : quotient(digits, m.low_digit_states);
  return {code, rank, digits - high * m.low_digit_states.value, high};
}

// symbols[column][row]: the signed levels of a tile's chunk, from codes in the file's order.
[[maybe_unused]] void decode_plane(const MatrixView& m, int64_t tile, int64_t chunk,
                                   int8_t (*symbols)[kTileRows]) {
  const PlaneChunk part = plane_chunk(m, tile, chunk);
  std::memset(symbols, 0, static_cast<size_t>(m.chunk_columns) * kTileRows);
  for (int64_t r = 0; r < part.rows; ++r) {
    const uint8_t* stream = m.codes + (tile * kTileRows + r) * m.code_row_bytes;
    for (int64_t g = 0; g < part.groups; ++g) {
      const PlaneCode code = read_plane_code(m, stream, part.first_bit + g * m.code_bits);
      const uint64_t magnitudes[2] = {m.magnitudes[code.low_digits], m.magnitudes[code.high_digits]};
      const uint8_t* expand = m.expand + code.rank * 16;
      for (int c = 0; c < m.group; ++c) {
        const int k = expand[c];
        if (k == kPruned) continue;
        const auto magnitude = static_cast<int8_t>(magnitudes[k / 8] >> k % 8 * 8);
        symbols[g * m.group + c][r] = static_cast<int8_t>(code.signs >> k & 1 ? -magnitude : magnitude);
      }
    }
  }
}

// panel = scales applied to signed levels, then the salient and the outlier columns of the chunk.
void scale_symbols(const MatrixView& m, int64_t tile, int64_t chunk, const int8_t (*symbols)[kTileRows],
                   float* panel) {
  float scales[kMaxSlots][kTileRows] = {};
  for (int slot = 0; slot < m.slots; ++slot)
    slot_scales(m, tile, chunk / m.chunks_per_block, slot, scales[slot]);
  for (int64_t c = 0; c < m.chunk_columns; ++c) {
    const int8_t* symbol = symbols[c];
    float* out = panel + c * kTileRows;
    if (m.levels == 1) {
      for (int r = 0; r < kTileRows; ++r) out[r] = static_cast<float>(symbol[r]) * scales[0][r];
      continue;
    }
    // Loads first: then every step is a select that compilers turn into a blend.
    for (int r = 0; r < kTileRows; ++r) {
      const float scale0 = scales[0][r], scale1 = scales[1][r], scale2 = scales[2][r];
      const int s = symbol[r], magnitude = s < 0 ? -s : s;
      float weight = magnitude == 1 ? scale0 : 0.0f;
      weight = magnitude == 2 ? scale1 : weight;
      weight = magnitude == 3 ? scale2 : weight;
      out[r] = s < 0 ? -weight : weight;
    }
  }

  const int64_t first = chunk * m.chunk_columns, last = first + m.chunk_columns;
  for (int64_t i = 0; i < m.salient; ++i) {
    if (m.salient_columns[i] < first || m.salient_columns[i] >= last) continue;
    const int8_t* symbol = symbols[m.salient_columns[i] - first];
    const uint8_t* residual = m.salient_signs + i * m.tiles * 8 + tile * 8;
    float* out = panel + (m.salient_columns[i] - first) * kTileRows;
    for (int r = 0; r < kTileRows; ++r) {
      const float base = symbol[r] < 0 ? -scales[m.levels][r] : scales[m.levels][r];
      const float rest = residual[r / 8] >> r % 8 & 1 ? -scales[m.levels + 1][r] : scales[m.levels + 1][r];
      out[r] = symbol[r] == 0 ? 0.0f : base + rest;
    }
  }
  for (int64_t i = 0; i < m.outliers; ++i)
    if (m.outlier_columns[i] >= first && m.outlier_columns[i] < last)
      load_floats(m.outlier_values + (i * m.tiles + tile) * kTileRows, true, kTileRows,
                  panel + (m.outlier_columns[i] - first) * kTileRows);
}

// --- rows of integers ---

// The columns of a chunk that exist, and the rows of a tile.
struct RowsChunk {
  int64_t rows, columns;
  const uint8_t* codes;  // of the first row
};
inline RowsChunk rows_chunk(const MatrixView& m, int64_t tile, int64_t chunk) {
  const int64_t rows = m.rows - tile * kTileRows, columns = m.cols - chunk * m.chunk_columns;
  return {rows < kTileRows ? rows : kTileRows, columns < m.chunk_columns ? columns : m.chunk_columns,
          m.codes + tile * kTileRows * m.code_row_bytes + chunk * m.chunk_columns * m.code_bits / 8};
}

// The twin of decode_plane() for kRows.
[[maybe_unused]] void decode_rows(const MatrixView& m, int64_t tile, int64_t chunk,
                                  int8_t (*symbols)[kTileRows]) {
  const RowsChunk part = rows_chunk(m, tile, chunk);
  std::memset(symbols, 0, static_cast<size_t>(m.chunk_columns) * kTileRows);
  for (int64_t r = 0; r < part.rows; ++r) {
    const uint8_t* codes = part.codes + r * m.code_row_bytes;
    for (int64_t c = 0; c < part.columns; ++c)
      symbols[c][r] = static_cast<int8_t>(m.code_bits == 8 ? codes[c] : (codes[c / 2] >> c % 2 * 4 & 15) - 8);
  }
}

// A chunk of 64 columns; lane j of vector k is column 4 j + k.
template <int Bits>
STBLLM_INLINE void load_integers(const uint8_t* codes, Lanes (&q)[4]) {
  if constexpr (Bits == 8) {
    IntLanes<Lanes> bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    for (int k = 0; k < 4; ++k) q[k] = converted<float>(signed_bytes_of(bytes, k));
  } else {
    WordLanes<Lanes> words;
    std::memcpy(&words, codes, sizeof words);
    for (int k = 0; k < 4; ++k) q[k] = converted<float>(nibbles_of(words, k) - 8);
  }
}

template <int Bits>
STBLLM_INLINE void multiply_row(const MatrixView& m, int64_t row, const float* x, int64_t tokens, float* y) {
  constexpr int kColumns = 4 * kLanes, kBytes = kColumns * Bits / 8;
  const uint8_t* codes = m.codes + row * m.code_row_bytes;
  const int64_t width = m.chunks * kColumns;
  Lanes sums[kFewTokens] = {};
  for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
    Lanes q[4];
    const int64_t first = chunk * kBytes;
    if (first + kBytes <= m.code_row_bytes) {
      load_integers<Bits>(codes + first, q);
    } else {  // what lies behind the last column meets zeros
      uint8_t last[kBytes] = {};
      std::memcpy(last, codes + first, static_cast<size_t>(m.code_row_bytes - first));
      load_integers<Bits>(last, q);
    }
    const float scale = half_to_float(m.half_scales[chunk * m.tiles * kTileRows + row]);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* from = x + t * width + chunk * kColumns;
      Lanes product = q[0] * load_lanes<Lanes>(from);
      for (int k = 1; k < 4; ++k) product += q[k] * load_lanes<Lanes>(from + k * kLanes);
      sums[t] += product * scale;
    }
  }
  for (int64_t t = 0; t < tokens; ++t) y[t * kTileRows] = sum_of(sums[t]);
}

void multiply_rows(const MatrixView& m, int64_t tile, const float* x, int64_t tokens, float* y) {
  const int64_t first = tile * kTileRows, last = first + kTileRows < m.rows ? first + kTileRows : m.rows;
  for (int64_t row = first; row < last; ++row) {
    float* to = y + row - first;
    if (tokens == 1)  // a constant, for the usual case
      m.code_bits == 8 ? multiply_row<8>(m, row, x, 1, to) : multiply_row<4>(m, row, x, 1, to);
    else
      m.code_bits == 8 ? multiply_row<8>(m, row, x, tokens, to) : multiply_row<4>(m, row, x, tokens, to);
  }
}

// The bits of sixteen rows.
inline uint32_t row_bits(const uint8_t* bits, int first_row) {
  uint16_t result;
  std::memcpy(&result, bits + first_row / 8, sizeof result);
  return result;
}

void decode_apart(const MatrixView& m, int64_t tile, float* panel) {
  for (int64_t i = 0; i < m.outliers; ++i, panel += kTileRows)
    load_floats(m.outlier_values + (i * m.tiles + tile) * kTileRows, true, kTileRows, panel);
  float base[kTileRows], rest[kTileRows];
  int64_t scaled_block = -1;  // columns are in order, and some share a block
  for (int64_t i = 0; i < m.salient; ++i, panel += kTileRows) {
    const int64_t block = m.salient_columns[i] / (m.chunks_per_block * m.chunk_columns),
                  at = (i * m.tiles + tile) * 8;
    if (block != scaled_block) {
      slot_scales(m, tile, block, m.levels, base);
      slot_scales(m, tile, block, m.levels + 1, rest);
      scaled_block = block;
    }
    for (int first = 0; first < kTileRows; first += 16) {
      const uint32_t kept = row_bits(m.salient_kept + at, first),
                     signs = row_bits(m.salient_first_signs + at, first),
                     rest_signs = row_bits(m.salient_signs + at, first);
      for (int r = 0; r < 16; ++r) {
        const uint32_t bit = uint32_t{1} << r;
        const float a = base[first + r], b = rest[first + r];
        const float weight = (signs & bit ? -a : a) + (rest_signs & bit ? -b : b);
        panel[first + r] = kept & bit ? weight : 0.0f;
      }
    }
  }
}

}  // namespace
}  // namespace stbllm::cpu
