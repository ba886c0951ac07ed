// AVX2, FMA and F16C; with AVX-VNNI products of integers are one instruction.
//
// A byte shuffle answers 32 rows with one byte of an entry, and its tables have 16 entries: codes
// become nibbles, two columns each (one column with two or three levels). Two nibbles of 64 rows cost 8
// shuffles, 8 unpacks to words, 8 additions, 6 to split them and 6 loads. Machines start one to two shuffles
// or unpacks per cycle, so that one level does 16 to 32 weights per cycle, more levels half of that.

#include <immintrin.h>

#include "plain_loops.h"

namespace stbllm::cpu {
namespace {

STBLLM_INLINE __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

// --- lookups ---

constexpr int kEntries = 16, kTableBytes = 2 * kEntries;

bool can_look_up(CodeForm form, int entries) { return form == CodeForm::kNibbles && entries == kEntries; }

// The indices of two groups for the 64 rows of a tile, 32 each.
struct Indices {
  __m256i even[2], odd[2];
};
STBLLM_INLINE Indices read_indices(const uint8_t* codes) {
  const __m256i nibble = _mm256_set1_epi8(15);
  Indices index;
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes = load(codes + 32 * half);
    index.even[half] = _mm256_and_si256(bytes, nibble);
    index.odd[half] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
  }
  return index;
}

// The bytes of 16 entries, low or high ones, for both lanes of a shuffle.
STBLLM_INLINE __m256i load_bytes(const uint8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
}

// sum[2 h] has rows 32 h + 0..7 and 16..23 of the tile, sum[2 h + 1] the others.
STBLLM_INLINE void add_entries(const uint8_t* table, const __m256i (&index)[2], __m256i (&sum)[4]) {
  const __m256i low = load_bytes(table), high = load_bytes(table + kEntries);
  for (int half = 0; half < 2; ++half) {
    const __m256i l = _mm256_shuffle_epi8(low, index[half]), h = _mm256_shuffle_epi8(high, index[half]);
    sum[2 * half] = _mm256_add_epi16(sum[2 * half], _mm256_unpacklo_epi8(l, h));
    sum[2 * half + 1] = _mm256_add_epi16(sum[2 * half + 1], _mm256_unpackhi_epi8(l, h));
  }
}

// y[0..7] += step * scale * words
STBLLM_INLINE void add_scaled(__m128i words, const float* scale, float step, float* y) {
  const __m256 sum = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words));
  _mm256_store_ps(
      y, _mm256_fmadd_ps(sum, _mm256_mul_ps(_mm256_load_ps(scale), _mm256_set1_ps(step)), _mm256_load_ps(y)));
}

// Looks up a tile's chunk in Sets sets of tables from `set` on, which share the extraction of the indices.
// `scales` are those of each sum, `y` begins at the tile.
template <int Sets>
STBLLM_INLINE void look_up_tile(const MatrixView& m, const LookupPass& pass, int64_t set,
                                const uint8_t* codes, const float (*scales)[kTileRows], float* y) {
  const int groups = kChunkColumns / m.group;
  const int64_t set_bytes = groups * kTableBytes;
  const uint8_t* tables = pass.tables + set * set_bytes;
  __m256i sums[Sets][4];
  for (int s = 0; s < Sets; ++s)
    for (__m256i& sum : sums[s]) sum = _mm256_setzero_si256();
  for (int g = 0; g < groups; g += 2, codes += kTileRows, tables += 2 * kTableBytes) {
    const Indices index = read_indices(codes);
    for (int s = 0; s < Sets; ++s) {
      add_entries(tables + s * set_bytes, index.even, sums[s]);
      add_entries(tables + s * set_bytes + kTableBytes, index.odd, sums[s]);
    }
  }
  for (int s = 0; s < Sets; ++s) {
    const auto [token, sum] = place_of(m, set + s);
    const float step = pass.steps[set + s];
    for (int part = 0; part < 4; ++part) {
      const int row = part / 2 * 32 + part % 2 * 8;
      float* out = y + token * pass.y_stride + row;
      add_scaled(_mm256_castsi256_si128(sums[s][part]), scales[sum] + row, step, out);
      add_scaled(_mm256_extracti128_si256(sums[s][part], 1), scales[sum] + row + 16, step, out + 16);
    }
  }
}

void look_up(const MatrixView& m, const LookupPass& pass) {
  constexpr int kTogether = 2;
  alignas(32) float scales[kMaxSlots][kTileRows];
  for (int64_t tile = pass.first_tile; tile < pass.last_tile; ++tile) {
    const uint8_t* codes = m.codes + (pass.chunk * m.tiles + tile) * m.chunk_bytes;
    const int64_t row = tile * kTileRows;
    for (int sum = 0; sum < m.sums; ++sum)
      load_sum_scales(m, tile, pass.chunk / m.chunks_per_block, sum, scales[sum]);
    int64_t set = 0;
    for (; set + kTogether <= pass.sets; set += kTogether)
      look_up_tile<kTogether>(m, pass, set, codes, scales, pass.y + row);
    for (; set < pass.sets; ++set) look_up_tile<1>(m, pass, set, codes, scales, pass.y + row);
  }
}

// The tables of a chunk's groups of Group columns with Levels levels, from the integers of each level.
template <int Group, int Levels>
void tabulate_groups(const int16_t (*integers)[kChunkColumns], const int16_t (*signs)[kEntries],
                     uint8_t* tables) {
  __m256i sign[Levels * Group];
  for (int s = 0; s < Levels * Group; ++s) sign[s] = load(signs[s]);
  for (int first = 0; first < kChunkColumns; first += Group, tables += kTableBytes) {
    __m256i entries = _mm256_setzero_si256();
    for (int level = 0; level < Levels; ++level)
      for (int c = 0; c < Group; ++c)
        entries = _mm256_add_epi16(entries, _mm256_mullo_epi16(_mm256_set1_epi16(integers[level][first + c]),
                                                               sign[level * Group + c]));
    const __m256i bytes =
        _mm256_packus_epi16(_mm256_and_si256(entries, _mm256_set1_epi16(255)), _mm256_srli_epi16(entries, 8));
    _mm256_store_si256(reinterpret_cast<__m256i*>(tables), _mm256_permute4x64_epi64(bytes, 0xd8));
  }
}

void tabulate(const MatrixView& m, int sum, const float* x, uint8_t* tables, float* step) {
  *step = step_of(bound_of_chunk(m, x));
  const float inverse = *step == *step ? 1.0f / *step : 0.0f;
  alignas(32) int16_t integers[kMaxLevels][kChunkColumns];
  for (int level = 0; level < m.levels; ++level) {
    const __m256 factor = _mm256_set1_ps(m.level_worth[sum][level]), scale = _mm256_set1_ps(inverse);
    for (int c = 0; c < kChunkColumns; c += 16) {
      const auto rounded = [&](int from) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + from), factor), scale));
      };
      const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(rounded(c), rounded(c + 8)), 0xd8);
      _mm256_store_si256(reinterpret_cast<__m256i*>(&integers[level][c]), words);
    }
  }
  alignas(32) int16_t signs[kMaxLevels][kEntries];
  signs_of_entries(m, signs);
  if (m.levels == 1) return tabulate_groups<2, 1>(integers, signs, tables);
  return m.levels == 2 ? tabulate_groups<1, 2>(integers, signs, tables)
                       : tabulate_groups<1, 3>(integers, signs, tables);
}

// --- panels ---

void decode(const MatrixView& m, int64_t tile, int64_t chunk, float* panel) {
  alignas(32) int8_t symbols[kChunkColumns][kTileRows];
  if (m.form == CodeForm::kPlane) {
    decode_plane(m, tile, chunk, symbols);
  } else if (m.form == CodeForm::kRows) {
    decode_rows(m, tile, chunk, symbols);
  } else {
    // The symbol of a column is the low byte of the dot product with its unit vector.
    const uint8_t* codes = m.codes + (chunk * m.tiles + tile) * m.chunk_bytes;
    for (int g = 0; g < kChunkColumns / m.group; g += 2, codes += kTileRows) {
      const Indices index = read_indices(codes);
      for (int c = 0; c < m.group; ++c) {
        const __m256i table = load_bytes(m.unit_tables + c * kTableBytes);
        for (int half = 0; half < 2; ++half) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(symbols[g * m.group + c] + 32 * half),
                             _mm256_shuffle_epi8(table, index.even[half]));
          _mm256_store_si256(reinterpret_cast<__m256i*>(symbols[(g + 1) * m.group + c] + 32 * half),
                             _mm256_shuffle_epi8(table, index.odd[half]));
        }
      }
    }
  }
  scale_symbols(m, tile, chunk, symbols, panel);
}

// Sixteen registers: 2 times 6 of sums (rows of the tile by tokens), 2 of weights, 1 of a broadcast
// activation.
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
  for (int row = 0; row < kTileRows; row += kPassRows)
    in_token_passes<kPassTokens>(tokens, [&](int64_t t, auto count) {
      multiply_tokens<count>(panel + row, columns, x + t * columns, y + t * y_stride + row, y_stride);
    });
}

// --- panels of integers ---

STBLLM_INLINE void store(void* to, __m256i x) { _mm256_store_si256(static_cast<__m256i*>(to), x); }

// Two columns of a panel for 32 rows: what each row finds in its column's table. Writes (32 rows, 2).
STBLLM_INLINE void decode_pair(const uint8_t* table, __m256i index, const uint8_t* next_table,
                               __m256i next_index, uint16_t* to) {
  // Bytes of rows 0..15 and 16..31 lie in one lane each; so do words and pairs that come of them.
  const auto words = [](const uint8_t* entries, __m256i of, __m256i(&both)[2]) {
    const __m256i low = _mm256_shuffle_epi8(load_bytes(entries), of),
                  high = _mm256_shuffle_epi8(load_bytes(entries + kEntries), of);
    both[0] = _mm256_unpacklo_epi8(low, high);
    both[1] = _mm256_unpackhi_epi8(low, high);
  };
  __m256i even[2], odd[2];
  words(table, index, even);
  words(next_table, next_index, odd);
  for (int half = 0; half < 2; ++half, to += 16) {  // rows 8 half .. 8 half + 7 of each lane
    const __m256i low = _mm256_unpacklo_epi16(even[half], odd[half]),
                  high = _mm256_unpackhi_epi16(even[half], odd[half]);
    store(to, _mm256_permute2x128_si256(low, high, 0x20));
    store(to + 32, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

void decode_integers(const MatrixView& m, int64_t tile, int64_t chunk, int sum, uint16_t* panel,
                     float* scales) {
  integer_scales(m, tile, chunk, sum, scales);
  if (m.form == CodeForm::kRows) {
    alignas(32) int8_t symbols[kChunkColumns][kTileRows];
    decode_rows(m, tile, chunk, symbols);
    for (int64_t c = 0; c < m.chunk_columns; c += 2)
      for (int row = 0; row < kTileRows; row += 16, panel += 32) {
        const auto column = [&](int64_t at) {
          return _mm_load_si128(reinterpret_cast<const __m128i*>(symbols[at] + row));
        };
        store(panel, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(column(c), column(c + 1))));
        store(panel + 16, _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(column(c), column(c + 1))));
      }
    return;
  }
  const uint8_t* codes = m.codes + (chunk * m.tiles + tile) * m.chunk_bytes;
  const uint8_t *table = m.integer_tables + sum * m.group * kTableBytes, *next = table + kTableBytes;
  constexpr int kPair = 2 * kTileRows;
  for (int g = 0; g < kChunkColumns / m.group; g += 2, codes += kTileRows, panel += m.group * kPair) {
    const Indices index = read_indices(codes);
    for (int half = 0; half < 2; ++half) {
      uint16_t* to = panel + half * kTileRows;
      if (m.group == 1) {
        decode_pair(table, index.even[half], table, index.odd[half], to);
      } else {
        decode_pair(table, index.even[half], next, index.even[half], to);
        decode_pair(table, index.odd[half], next, index.odd[half], to + kPair);
      }
    }
  }
}

// sum += pairs of 16-bit products. From intrinsics g++ 12 makes a copy and a spill of every sum.
template <bool Vnni>
STBLLM_INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) {
  if constexpr (Vnni) {  // in the encoding of AVX, which does not ask for AVX-512
    asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  } else {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
  }
  return sum;
}

// Sums of pairs of products of Tokens tokens of `in`, from `token` on, with 16 rows of a panel.
template <bool Vnni, int Tokens>
void multiply_tokens_integers(const WordPanel& weights, int row, const WordActivations& in, int64_t token,
                              float* y, int64_t y_stride) {
  const uint16_t* x = in.x + token * weights.columns;
  __m256i sums[Tokens][2];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 2; ++v) sums[t][v] = _mm256_setzero_si256();
  for (int64_t c = 0; c < weights.columns; c += 2) {
    const uint16_t* pairs = weights.panel + c * kTileRows + 2 * row;
    const __m256i columns[2] = {load(pairs), load(pairs + 16)};
    for (int t = 0; t < Tokens; ++t) {
      int32_t pair;
      std::memcpy(&pair, x + t * weights.columns + c, sizeof pair);
      const __m256i activations = _mm256_set1_epi32(pair);
      for (int v = 0; v < 2; ++v) sums[t][v] = add_products<Vnni>(sums[t][v], activations, columns[v]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 2; ++v) {
      float* to = y + (token + t) * y_stride + row + 8 * v;
      const __m256 scaled =
          _mm256_mul_ps(_mm256_set1_ps(in.steps[token + t]), _mm256_loadu_ps(weights.scales + row + 8 * v));
      _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][v]), scaled, _mm256_loadu_ps(to)));
    }
}

template <bool Vnni>
void multiply_integers(const WordPanel& weights, const WordActivations& in, float* y, int64_t y_stride) {
  for (int row = 0; row < kTileRows; row += kPassRows)
    in_token_passes<kPassTokens>(in.tokens, [&](int64_t t, auto count) {
      multiply_tokens_integers<Vnni, count>(weights, row, in, t, y, y_stride);
    });
}

template <bool Vnni>
constexpr WordKernels kIntegers = {
    .token_step = 1,
    .share_tokens = 4 * kPassTokens,
    .arrange = to_integers,
    .decode = decode_integers,
    .multiply = multiply_integers<Vnni>,
};

constexpr Kernels kernels_named(const char* name, const WordKernels& integers) {
  return {
      .name = name,
      .can_look_up = can_look_up,
      .decode = decode,
      .decode_apart = decode_apart,
      .multiply = multiply,
      .integers = &integers,
      .bfloat16 = nullptr,
      .multiply_rows = multiply_rows,
      .tabulate = tabulate,
      .look_up = look_up,
      .load_floats = load_floats,
      .store_floats = store_floats,
  };
}

}  // namespace

constinit const Kernels kAvx2Kernels = kernels_named("cpu-avx2", kIntegers<false>);
constinit const Kernels kAvxVnniKernels = kernels_named("cpu-avxvnni", kIntegers<true>);

}  // namespace stbllm::cpu
