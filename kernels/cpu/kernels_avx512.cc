// Kernels for AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, VNNI).
//
// A table register answers 32 (vpermw) or 64 (vpermb) rows per instruction. Looking up a group costs,
// for 64 rows and one token, this many 512-bit instructions (Zen 4 starts two per cycle, permutations one):
//   words of 3..5 bits   2 x (extract, vpermw, add)                                            6
//   words of 7 bits      2 x (extract, test, 2 vpermi2w, blend, add)                          12
//   bytes                4 vpermi2b, 2 blends, 1 mask, 2 unpacks, 2 adds                      11
//   bytes with signs     + 2 mask loads, 2 masked subtractions                                15
//   halves               4 vpermi2b, 4 unpacks, 4 adds, 5 to make the second index            17
// so at most 2:4 does 85, 3:8 68, 2:8 85, 4:8 60 and 2:4 with three levels 47 weights per cycle; then 64 sums
// become floats and meet their scales once per 128 columns, another 20 to 30.

// g++ 12 takes the "undefined" operands inside its own intrinsics for a mistake (GCC bug 105593).
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "plain_loops.h"

namespace stbllm::cpu {
namespace {

STBLLM_INLINE __m512i load(const void* p) { return _mm512_load_si512(p); }

// Keeps a value in a register from here on: without it the compiler folds one load into every instruction
// that uses it, and reorders sums until they no longer fit the registers.
STBLLM_INLINE __m512i pinned(__m512i value) {
  asm("" : "+v"(value));
  return value;
}
STBLLM_INLINE void add_to(__m512i& sum, __m512i value) { sum = pinned(_mm512_add_epi16(sum, value)); }

// --- lookups ---
// A form knows how its codes are stored and how an index is looked up. Rows 0..31 of a tile are the lanes of
// the first sum, rows 32..63 those of the second.

// What one pass reads of a strip: tiles [first, first + Tiles) of those interleaved at `codes`.
struct Strip {
  const uint8_t* codes;
  int64_t tiles;
  int64_t first;
};

// The lower half of each 32-bit pair high:low, shifted right: one field of a stream of 16-bit words.
template <int Shift, int Bits>
STBLLM_INLINE __m512i field(const __m512i* low, const __m512i* high) {
  if constexpr (Shift == 0)
    return load(low);
  else if constexpr (Shift + Bits <= 16)
    return _mm512_srli_epi16(load(low), Shift);
  else
    return _mm512_shrdi_epi16(load(low), load(high), Shift);
}

template <int Bits>
struct Words {
  static constexpr int kGroupBytes = Bits * kTileRows / 8, kTableBytes = Bits <= 5   ? 64
                                                                         : Bits == 6 ? 128
                                                                                     : 256;
  struct Index {
    __m512i first, second;  // what lies above the index bits is ignored by the permutations
  };

  template <int Tiles, typename F>
  STBLLM_INLINE void for_each_group(const Strip& strip, int groups, F&& f) const {
    static_assert(Tiles == 1);
    for (int unit = 0; unit < groups / 16; ++unit)
      unroll<16>([&](auto g) __attribute__((always_inline)) {
        constexpr int kOffset = g * Bits, kWord = kOffset / 16, kShift = kOffset % 16;
        const __m512i* words = reinterpret_cast<const __m512i*>(strip.codes) + (unit * Bits + kWord) * 2;
        const Index index[1] = {{pinned(field<kShift, Bits>(words, words + 2)),
                                 pinned(field<kShift, Bits>(words + 1, words + 3))}};
        f(unit * 16 + g, index);
      });
  }

  struct Table {
    __m512i part[kTableBytes / 64];
  };
  static STBLLM_INLINE Table load_table(const uint8_t* from) {
    Table table;
    for (int i = 0; i < kTableBytes / 64; ++i) table.part[i] = pinned(load(from + 64 * i));
    return table;
  }

  static STBLLM_INLINE __m512i look_up(__m512i index, const Table& table) {
    if constexpr (Bits <= 5) return _mm512_permutexvar_epi16(index, table.part[0]);
    const __m512i low = _mm512_permutex2var_epi16(table.part[0], index, table.part[1]);
    if constexpr (Bits == 6) return low;
    const __m512i high = _mm512_permutex2var_epi16(table.part[2], index, table.part[3]);
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)), low, high);
  }

  static STBLLM_INLINE void add(const Index& index, const Table& table, __m512i (&sum)[2]) {
    add_to(sum[0], look_up(index.first, table));
    add_to(sum[1], look_up(index.second, table));
  }
};

// Low and high bytes of 64 entries of 128: words after unpacking.
struct BytePair {
  __m512i low, high;
};
struct ByteTable {
  __m512i part[8];
};
STBLLM_INLINE ByteTable load_byte_table(const uint8_t* from) {
  ByteTable table;
  for (int i = 0; i < 8; ++i) table.part[i] = pinned(load(from + 64 * i));
  return table;
}
STBLLM_INLINE BytePair look_up_128(__m512i index, const __m512i* part) {
  return {_mm512_permutex2var_epi8(part[0], index, part[1]),
          _mm512_permutex2var_epi8(part[2], index, part[3])};
}

template <bool Signed>
struct Bytes {
  static constexpr int kGroupBytes = Signed ? 72 : 64, kTableBytes = 512;
  struct Index {
    __m512i bytes;
    __mmask64 upper;        // index >= 128
    __mmask32 negative[2];  // by lane of a sum
  };

  template <int Tiles, typename F>
  STBLLM_INLINE void for_each_group(const Strip& strip, int groups, F&& f) const {
    const uint8_t* signs = strip.codes + groups * strip.tiles * kTileRows;
    for (int g = 0; g < groups; ++g) {
      Index index[Tiles];
      for (int v = 0; v < Tiles; ++v) {
        const int64_t at = g * strip.tiles + strip.first + v;
        index[v].bytes = load(strip.codes + at * kTileRows);
        index[v].upper = _mm512_movepi8_mask(index[v].bytes);
        if (Signed) std::memcpy(index[v].negative, signs + at * kTileRows / 8, kTileRows / 8);
      }
      f(g, index);
    }
  }

  using Table = ByteTable;
  static STBLLM_INLINE Table load_table(const uint8_t* from) { return load_byte_table(from); }

  static STBLLM_INLINE void add(const Index& index, const Table& table, __m512i (&sum)[2]) {
    const BytePair lower = look_up_128(index.bytes, table.part),
                   upper = look_up_128(index.bytes, table.part + 4);
    const __m512i low = _mm512_mask_blend_epi8(index.upper, lower.low, upper.low);
    const __m512i high = _mm512_mask_blend_epi8(index.upper, lower.high, upper.high);
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    const __m512i before[2] = {sum[0], sum[1]};
    add_to(sum[0], first);
    add_to(sum[1], second);
    if (Signed) {
      sum[0] = _mm512_mask_sub_epi16(sum[0], index.negative[0], before[0], first);
      sum[1] = _mm512_mask_sub_epi16(sum[1], index.negative[1], before[1], second);
    }
  }
};

struct Halves {
  static constexpr int kGroupBytes = 96, kTableBytes = 512;
  struct Index {
    __m512i left, right;
  };

  // The right index is stored relative to the first state with as many kept as the left half leaves.
  static STBLLM_INLINE __m512i right_index(__m512i left, __m512i low_bits, __m512i base0, __m512i base1) {
    const __m512i base = _mm512_permutex2var_epi8(base0, left, base1);
    const __m512i sum = _mm512_add_epi8(base, low_bits);
    return _mm512_mask_add_epi8(sum, _mm512_movepi8_mask(left), sum, _mm512_set1_epi8(16));
  }

  template <int Tiles, typename F>
  STBLLM_INLINE void for_each_group(const Strip& strip, int groups, F&& f) const {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int pair = 0; pair < groups / 2; ++pair) {
      Index even[Tiles], odd[Tiles];
      for (int v = 0; v < Tiles; ++v) {
        const uint8_t* from = strip.codes + (pair * 3 * strip.tiles + strip.first + v) * kTileRows;
        const int64_t part = strip.tiles * kTileRows;
        const __m512i left0 = load(from), left1 = load(from + part), nibbles = load(from + 2 * part);
        even[v] = {left0, right_index(left0, _mm512_and_si512(nibbles, nibble), base0, base1)};
        odd[v] = {left1,
                  right_index(left1, _mm512_and_si512(_mm512_srli_epi16(nibbles, 4), nibble), base0, base1)};
      }
      f(2 * pair, even);
      f(2 * pair + 1, odd);
    }
  }

  using Table = ByteTable;
  static STBLLM_INLINE Table load_table(const uint8_t* from) { return load_byte_table(from); }

  static STBLLM_INLINE void add(const Index& index, const Table& table, __m512i (&sum)[2]) {
    const BytePair left = look_up_128(index.left, table.part),
                   right = look_up_128(index.right, table.part + 4);
    add_to(sum[0], _mm512_unpacklo_epi8(left.low, left.high));
    add_to(sum[1], _mm512_unpackhi_epi8(left.low, left.high));
    add_to(sum[0], _mm512_unpacklo_epi8(right.low, right.high));
    add_to(sum[1], _mm512_unpackhi_epi8(right.low, right.high));
  }

  __m512i base0, base1;
};

// Sixteen scales of a tile's chunk, without the row scales: fp16, or a factor by its code.
STBLLM_INLINE __m512 load_scales(const MatrixView& m, int64_t block, int64_t sum, int64_t row) {
  if (m.half_scales != nullptr) {
    const uint16_t* from = m.half_scales + (block * m.slots + sum) * m.tiles * kTileRows + row;
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
  }
  const int64_t at = block * m.tiles * kTileRows + row;
  const __m512i code =
      _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(m.scale_codes + at)));
  const __m512 low =
      _mm512_permutex2var_ps(_mm512_loadu_ps(m.factors), code, _mm512_loadu_ps(m.factors + 16));
  if (m.scale_bits <= 5) return low;
  const __m512 high =
      _mm512_permutex2var_ps(_mm512_loadu_ps(m.factors + 32), code, _mm512_loadu_ps(m.factors + 48));
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(code, _mm512_set1_epi32(32)), low, high);
}

// y[0..31] += step * scale * sum: even lanes of the sum are the first 16 rows, odd lanes the others.
STBLLM_INLINE void add_scaled(__m512i sum, __m512 scale0, __m512 scale1, float step, float* y) {
  const __m512 even = _mm512_cvtepi32_ps(_mm512_slli_epi32(sum, 16));  // times 2^16
  const __m512 odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(sum, 16));
  const __m512 step0 = _mm512_set1_ps(step * 0x1p-16f), step1 = _mm512_set1_ps(step);
  _mm512_store_ps(y, _mm512_fmadd_ps(even, _mm512_mul_ps(scale0, step0), _mm512_load_ps(y)));
  _mm512_store_ps(y + 16, _mm512_fmadd_ps(odd, _mm512_mul_ps(scale1, step1), _mm512_load_ps(y + 16)));
}

// Codes pass by once per product. They are fetched so many bytes ahead, which covers 100 ns at 33 GB/s,
// without displacing the tables.
constexpr int kPrefetchBytes = 4096;

// Tiles [tile, tile + Tiles) of the pass for its first Sets sets of tables: an index, once extracted, serves
// all of them, and a table, once loaded, all tiles.
template <int Sets, int Tiles, bool Prefetch, typename Form>
STBLLM_INLINE void look_up_tiles(const Form& form, const MatrixView& m, const LookupPass& pass,
                                 const Strip& strip, int64_t tile) {
  const int groups = kChunkColumns / m.group;
  const int64_t set_bytes = groups * Form::kTableBytes;
  constexpr int kPassBytes = Tiles * Form::kGroupBytes;
  const uint8_t* ahead = strip.codes + strip.first * m.chunk_bytes + kPrefetchBytes;
  __m512i sums[Sets][Tiles][2] = {};
  form.template for_each_group<Tiles>(
      strip, groups, [&](int g, const auto& index) __attribute__((always_inline)) {
        for (int at = 0; Prefetch && at < kPassBytes; at += 64)
          _mm_prefetch(ahead + g * kPassBytes + at, _MM_HINT_NTA);
        for (int s = 0; s < Sets; ++s) {
          const auto table = Form::load_table(pass.tables + s * set_bytes + g * Form::kTableBytes);
          for (int v = 0; v < Tiles; ++v) Form::add(index[v], table, sums[s][v]);
        }
      });
  const int64_t block = pass.chunk / m.chunks_per_block;
  for (int v = 0; v < Tiles; ++v)
    for (int half = 0; half < 2; ++half) {
      const int64_t row = (tile + v) * kTileRows + half * 32;
      if (m.sums == 1) {
        const __m512 scale0 = load_scales(m, block, 0, row), scale1 = load_scales(m, block, 0, row + 16);
        float* y = pass.y + pass.first_set * pass.y_stride + row;
        for (int s = 0; s < Sets; ++s, y += pass.y_stride)
          add_scaled(sums[s][v][half], scale0, scale1, pass.steps[s], y);
      } else {
        for (int s = 0; s < Sets; ++s) {
          const auto [token, sum] = place_of(m, pass.first_set + s);
          add_scaled(sums[s][v][half], load_scales(m, block, sum, row), load_scales(m, block, sum, row + 16),
                     pass.steps[s], pass.y + token * pass.y_stride + row);
        }
      }
    }
}

// The strip that starts at `tile`.
STBLLM_INLINE Strip strip_of(const MatrixView& m, int64_t chunk, int64_t tile) {
  const int64_t tiles = m.tiles - tile < m.strip_tiles ? m.tiles - tile : m.strip_tiles;
  return {m.codes + (chunk * m.tiles + tile) * m.chunk_bytes, tiles, 0};
}

// A pass without its first `count` sets of tables.
STBLLM_INLINE LookupPass after_sets(const LookupPass& pass, int64_t count, int64_t set_bytes) {
  LookupPass rest = pass;
  rest.sets -= count;
  rest.first_set += count;
  rest.tables += count * set_bytes;
  rest.steps += count;
  return rest;
}

// All tiles and tables of a pass, at most Sets sets of tables (which stay in the first-level cache) and Tiles
// tiles at a time.
template <int Sets, int Tiles, typename Form>
void look_up_form(const Form& form, const MatrixView& m, const LookupPass& pass) {
  const int64_t set_bytes = kChunkColumns / m.group * Form::kTableBytes;
  int64_t s = 0;
  for (; s + Sets <= pass.sets; s += Sets) {
    const LookupPass part = after_sets(pass, s, set_bytes);
    for (int64_t tile = pass.first_tile; tile < pass.last_tile; tile += m.strip_tiles) {
      Strip strip = strip_of(m, pass.chunk, tile);
      for (; strip.first + Tiles <= strip.tiles; strip.first += Tiles)
        if (s == 0)
          look_up_tiles<Sets, Tiles, true>(form, m, part, strip, tile + strip.first);
        else
          look_up_tiles<Sets, Tiles, false>(form, m, part, strip, tile + strip.first);
      for (; strip.first < strip.tiles; ++strip.first)
        look_up_tiles<Sets, 1, false>(form, m, part, strip, tile + strip.first);
    }
  }
  if constexpr (Sets > 1)
    if (s < pass.sets) {
      constexpr int kMoreTiles = Tiles > 1 ? 2 * Tiles : 1;
      look_up_form<Sets / 2, kMoreTiles>(form, m, after_sets(pass, s, set_bytes));
    }
}

bool can_look_up(CodeForm form, int) { return form != CodeForm::kNibbles; }

// Calls f with the form of this matrix: f(form, sets of tables per pass, tiles per pass). Word tables are
// small, so that several of them share the extraction of an index, all three of a token where there are so
// many; byte tables fill eight registers, so that several tiles share their loading.
template <typename F>
STBLLM_INLINE void with_form(const MatrixView& m, F&& f) {
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 4> four;
  switch (m.form) {
    case CodeForm::kPlane:
    case CodeForm::kNibbles:
    case CodeForm::kRows:
      return;
    case CodeForm::kWords:
      if (m.code_bits == 3) return f(Words<3>(), two, one);
      if (m.code_bits == 4) return f(Words<4>(), two, one);
      if (m.code_bits == 5) return m.sums == 3 ? f(Words<5>(), three, one) : f(Words<5>(), two, one);
      if (m.code_bits == 6) return m.sums == 3 ? f(Words<6>(), three, one) : f(Words<6>(), two, one);
      return f(Words<7>(), two, one);
    case CodeForm::kBytes:
      if (m.signs) return f(Bytes<true>(), two, two);
      return f(Bytes<false>(), one, four);
    case CodeForm::kHalves:
      return f(Halves{load(m.half_base), load(m.half_base + 64)}, two, two);
  }
}

void look_up(const MatrixView& m, const LookupPass& pass) {
  with_form(m, [&](const auto& form, auto pass_sets, auto pass_tiles) {
    look_up_form<pass_sets, pass_tiles>(form, m, pass);
  });
}

// --- tables ---

// An upper bound of the sum over groups of the largest contribution of any state to a dot product with x: the
// `keep` largest magnitudes of a group are at most their sum and at most `keep` times the largest. NaN and
// infinity propagate.
float bound_of(const MatrixView& m, const float* x) {
  __m512 bound = _mm512_setzero_ps(), all = _mm512_setzero_ps();
  const __m512 keep = _mm512_set1_ps(static_cast<float>(m.file_keep));
  for (int c = 0; c < kChunkColumns; c += 16) {
    const __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(x + c));
    all = _mm512_add_ps(all, magnitude);
    __m512 sum = magnitude, largest = magnitude;
    const auto fold = [&](__m512 sums, __m512 maxima) {
      sum = _mm512_add_ps(sum, sums);
      largest = _mm512_max_ps(largest, maxima);
    };
    fold(_mm512_permute_ps(sum, 0xb1), _mm512_permute_ps(largest, 0xb1));
    fold(_mm512_permute_ps(sum, 0x4e), _mm512_permute_ps(largest, 0x4e));
    if (m.file_group >= 8)
      fold(_mm512_shuffle_f32x4(sum, sum, 0xb1), _mm512_shuffle_f32x4(largest, largest, 0xb1));
    if (m.file_group == 16)
      fold(_mm512_shuffle_f32x4(sum, sum, 0x4e), _mm512_shuffle_f32x4(largest, largest, 0x4e));
    bound = _mm512_add_ps(bound, _mm512_min_ps(sum, _mm512_mul_ps(keep, largest)));
  }
  const float total = _mm512_reduce_add_ps(all);
  // A sum that is not finite must not look like a small one; 0 * total is NaN then.
  return _mm512_reduce_add_ps(bound) * largest_worth(m) / static_cast<float>(m.file_group) + 0.0f * total;
}

void tabulate(const MatrixView& m, int sum, const float* x, uint8_t* tables, float* step) {
  *step = step_of(bound_of(m, x));
  alignas(64) int16_t integers[3][kChunkColumns];
  for (int level = 0; level < m.levels; ++level) {
    const __m512 inverse = _mm512_set1_ps(*step == *step ? 1.0f / *step : 0.0f),
                 factors = _mm512_set1_ps(m.level_worth[sum][level]);
    for (int c = 0; c < kChunkColumns; c += 16) {
      // NaN and infinity become some integer here; the step makes the result NaN.
      const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + c), factors), inverse);
      _mm256_store_si256(reinterpret_cast<__m256i*>(&integers[level][c]),
                         _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled)));
    }
  }

  const bool words = m.form == CodeForm::kWords;
  const __m512i even = _mm512_set_epi8(126, 124, 122, 120, 118, 116, 114, 112, 110, 108, 106, 104, 102, 100,
                                       98, 96, 94, 92, 90, 88, 86, 84, 82, 80, 78, 76, 74, 72, 70, 68, 66, 64,
                                       62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28,
                                       26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi8(1));
  for (int group = 0; group < kChunkColumns / m.group; ++group) {
    __m512i sources = _mm512_setzero_si512();
    for (int level = 0; level < m.levels; ++level) {
      const int lane = level * m.group;
      const auto lanes = static_cast<__mmask32>(((1u << m.group) - 1u) << lane);
      sources = _mm512_mask_loadu_epi16(sources, lanes, integers[level] + group * m.group - lane);
    }
    const __m512i negatives = _mm512_sub_epi16(_mm512_setzero_si512(), sources);
    const auto entries = [&](int first) {  // 32 of them
      __m512i sum = _mm512_permutex2var_epi16(sources, load(m.terms + first), negatives);
      for (int k = 1; k < m.term_count; ++k)
        sum = _mm512_add_epi16(
            sum, _mm512_permutex2var_epi16(sources, load(m.terms + k * m.entries + first), negatives));
      return sum;
    };
    uint8_t* table = tables + group * m.table_bytes;
    if (words) {
      for (int first = 0; first < m.entries; first += 32)
        _mm512_store_si512(table + 2 * first, entries(first));
      continue;
    }
    for (int first = 0; first < m.entries; first += 64) {
      const __m512i lower = entries(first), upper = entries(first + 32);
      uint8_t* low = table + first / 128 * 256 + first % 128;
      _mm512_store_si512(low, _mm512_permutex2var_epi8(lower, even, upper));
      _mm512_store_si512(low + 128, _mm512_permutex2var_epi8(lower, odd, upper));
    }
  }
}

// --- panels ---

// out[i] = the i-th 64-bit lanes of in[0..7].
STBLLM_INLINE void transpose_lanes(const __m512i (&in)[8], __m512i (&out)[8]) {
  __m512i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(in[i], in[i + 1]);      // lanes 0 2 4 6 of two inputs
    pairs[i + 1] = _mm512_unpackhi_epi64(in[i], in[i + 1]);  // lanes 1 3 5 7
  }
  for (int i = 0; i < 8; i += 4)
    for (int odd = 0; odd < 2; ++odd) {
      quads[i + odd] = _mm512_shuffle_i64x2(pairs[i + odd], pairs[i + 2 + odd], 0x88);  // lanes 0 4 or 1 5
      quads[i + 2 + odd] =
          _mm512_shuffle_i64x2(pairs[i + odd], pairs[i + 2 + odd], 0xdd);  // lanes 2 6 or 3 7
    }
  for (int i = 0; i < 4; ++i) {
    out[i] = _mm512_shuffle_i64x2(quads[i], quads[i + 4], 0x88);
    out[i + 4] = _mm512_shuffle_i64x2(quads[i], quads[i + 4], 0xdd);
  }
}

// symbols[column][row] from (count, 64 rows, 8 columns).
STBLLM_INLINE void transpose_octets(const int8_t* octets, int64_t count, int8_t (*symbols)[kTileRows]) {
  const __m512i columns_first =
      _mm512_set_epi64(0x3f372f271f170f07, 0x3e362e261e160e06, 0x3d352d251d150d05, 0x3c342c241c140c04,
                       0x3b332b231b130b03, 0x3a322a221a120a02, 0x3931292119110901, 0x3830282018100800);
  for (int64_t octet = 0; octet < count; ++octet) {
    __m512i rows[8], columns[8];
    for (int i = 0; i < 8; ++i)
      rows[i] = _mm512_permutexvar_epi8(columns_first, load(octets + (octet * kTileRows + 8 * i) * 8));
    transpose_lanes(rows, columns);
    for (int i = 0; i < 8; ++i) _mm512_store_si512(symbols[octet * 8 + i], columns[i]);
  }
}

// The twin of decode_plane(): a byte shuffle puts the kept weights of a group in their places, and the bytes
// of eight columns and 64 rows are transposed together.
void decode_plane_by_shuffles(const MatrixView& m, int64_t tile, int64_t chunk,
                              int8_t (*symbols)[kTileRows]) {
  alignas(64) int8_t octets[kChunkColumns / 8 * kTileRows * 8 + 8];  // (columns / 8, rows, 8)
  const PlaneChunk part = plane_chunk(m, tile, chunk);
  if (part.rows < kTileRows || part.groups < m.chunk_columns / m.group || m.chunk_columns % 8 != 0)
    std::memset(octets, 0, sizeof octets);
  for (int64_t r = 0; r < part.rows; ++r) {
    const uint8_t* stream = m.codes + (tile * kTileRows + r) * m.code_row_bytes;
    for (int64_t g = 0; g < part.groups; ++g) {
      const PlaneCode code = read_plane_code(m, stream, part.first_bit + g * m.code_bits);
      const __m128i magnitudes = _mm_set_epi64x(static_cast<int64_t>(m.magnitudes[code.high_digits]),
                                                static_cast<int64_t>(m.magnitudes[code.low_digits]));
      const __m128i kept =
          _mm_mask_sub_epi8(magnitudes, static_cast<__mmask16>(code.signs), _mm_setzero_si128(), magnitudes);
      const __m128i group =
          _mm_shuffle_epi8(kept, _mm_load_si128(reinterpret_cast<const __m128i*>(m.expand + code.rank * 16)));
      const int64_t column = g * m.group;
      int8_t* out = octets + (column / 8 * kTileRows + r) * 8 + column % 8;
      const int64_t first = _mm_cvtsi128_si64(group), second = _mm_extract_epi64(group, 1);
      if (m.group == 4) {
        std::memcpy(out, &first, 4);
        continue;
      }
      std::memcpy(out, &first, 8);
      if (m.group == 16) std::memcpy(out + kTileRows * 8, &second, 8);
    }
  }
  transpose_octets(octets, (m.chunk_columns + 7) / 8, symbols);
}

// The twin of decode_rows().
void decode_rows_by_shuffles(const MatrixView& m, int64_t tile, int64_t chunk, int8_t (*symbols)[kTileRows]) {
  alignas(64) int8_t octets[kTileRows * kTileRows];  // (columns / 8, rows, 8)
  const RowsChunk part = rows_chunk(m, tile, chunk);
  const __mmask64 present = ~__mmask64{0} >> (64 - part.columns);
  for (int64_t first = 0; first < kTileRows; first += 8) {
    __m512i rows[8] = {}, by_octet[8];
    for (int64_t i = 0; i < 8 && first + i < part.rows; ++i) {
      const uint8_t* codes = part.codes + (first + i) * m.code_row_bytes;
      if (m.code_bits == 8) {
        rows[i] = _mm512_maskz_loadu_epi8(present, codes);
      } else {
        const auto bytes = static_cast<__mmask32>(~uint32_t{0} >> (32 - (part.columns + 1) / 2));
        const __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(bytes, codes));
        const __m512i nibbles =
            _mm512_and_si512(_mm512_or_si512(words, _mm512_slli_epi16(words, 4)), _mm512_set1_epi8(15));
        rows[i] = _mm512_maskz_sub_epi8(present, nibbles, _mm512_set1_epi8(8));
      }
    }
    transpose_lanes(rows, by_octet);
    for (int octet = 0; octet < 8; ++octet)
      _mm512_store_si512(octets + (octet * kTileRows + first) * 8, by_octet[octet]);
  }
  transpose_octets(octets, 8, symbols);
}

// The weight of a column is the dot product with its unit vector.
void decode_by_lookups(const MatrixView& m, int64_t tile, int64_t chunk, int8_t (*symbols)[kTileRows]) {
  const __m256i lane_of_row = _mm256_set_epi8(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30,
                                              28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  Strip strip = strip_of(m, chunk, tile - tile % m.strip_tiles);
  strip.first = tile % m.strip_tiles;
  with_form(m, [&](const auto& form, auto, auto) {
    form.template for_each_group<1>(strip, kChunkColumns / m.group, [&](int g, const auto& index) {
      for (int c = 0; c < m.group; ++c) {
        __m512i sums[2] = {};
        form.add(index[0], form.load_table(m.unit_tables + c * m.table_bytes), sums);
        auto* out = reinterpret_cast<__m256i*>(symbols[g * m.group + c]);
        for (int half = 0; half < 2; ++half)
          _mm256_store_si256(out + half,
                             _mm256_permutexvar_epi8(lane_of_row, _mm512_cvtepi16_epi8(sums[half])));
      }
    });
  });
}

STBLLM_INLINE void decode_symbols(const MatrixView& m, int64_t tile, int64_t chunk,
                                  int8_t (*symbols)[kTileRows]) {
  if (m.form == CodeForm::kPlane)
    decode_plane_by_shuffles(m, tile, chunk, symbols);
  else if (m.form == CodeForm::kRows)
    decode_rows_by_shuffles(m, tile, chunk, symbols);
  else
    decode_by_lookups(m, tile, chunk, symbols);
}

void decode(const MatrixView& m, int64_t tile, int64_t chunk, float* panel) {
  alignas(64) int8_t symbols[kChunkColumns][kTileRows];
  decode_symbols(m, tile, chunk, symbols);
  scale_symbols(m, tile, chunk, symbols, panel);
}

// Of 32 registers: 4 times 6 of sums (rows of the tile by tokens), 4 of weights, 1 of a broadcast activation.
constexpr int kPassTokens = 6;

template <int Tokens>
void multiply_tokens(const float* panel, int64_t columns, const float* x, float* y, int64_t y_stride) {
  __m512 sums[Tokens][4];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) sums[t][v] = _mm512_loadu_ps(y + t * y_stride + 16 * v);
  for (int64_t c = 0; c < columns; ++c) {
    __m512 weights[4];
    for (int v = 0; v < 4; ++v) weights[v] = _mm512_load_ps(panel + c * kTileRows + 16 * v);
    for (int t = 0; t < Tokens; ++t) {
      const __m512 activation = _mm512_set1_ps(x[t * columns + c]);
      for (int v = 0; v < 4; ++v) sums[t][v] = _mm512_fmadd_ps(activation, weights[v], sums[t][v]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) _mm512_storeu_ps(y + t * y_stride + 16 * v, sums[t][v]);
}

// sum + pairs of 16-bit products. From the intrinsic g++ 12 makes a copy and a spill of every sum.
STBLLM_INLINE __m512i add_products(__m512i sum, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}

// For the first Tokens tokens of `in`.
template <int Tokens>
void multiply_tokens_integers(const WordPanel& weights, const WordActivations& in, float* y,
                              int64_t y_stride) {
  __m512i sums[Tokens][4];
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) sums[t][v] = _mm512_setzero_si512();
  for (int64_t c = 0; c < weights.columns; c += 2) {
    __m512i pairs[4];
    for (int v = 0; v < 4; ++v) pairs[v] = load(weights.panel + c * kTileRows + 32 * v);
    for (int t = 0; t < Tokens; ++t) {
      int32_t pair;
      std::memcpy(&pair, in.x + t * weights.columns + c, sizeof pair);
      const __m512i activations = _mm512_set1_epi32(pair);
      for (int v = 0; v < 4; ++v) sums[t][v] = add_products(sums[t][v], activations, pairs[v]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int v = 0; v < 4; ++v) {
      float* to = y + t * y_stride + 16 * v;
      const __m512 scaled =
          _mm512_mul_ps(_mm512_set1_ps(in.steps[t]), _mm512_load_ps(weights.scales + 16 * v));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][v]), scaled, _mm512_loadu_ps(to)));
    }
}

void multiply(const float* panel, int64_t columns, const float* x, int64_t tokens, float* y,
              int64_t y_stride) {
  in_token_passes<kPassTokens>(tokens, [&](int64_t t, auto count) {
    multiply_tokens<count>(panel, columns, x + t * columns, y + t * y_stride, y_stride);
  });
}

void multiply_integers(const WordPanel& weights, const WordActivations& in, float* y, int64_t y_stride) {
  in_token_passes<kPassTokens>(in.tokens, [&](int64_t t, auto count) {
    const WordActivations part = {.x = in.x + t * weights.columns, .steps = in.steps + t, .tokens = count};
    multiply_tokens_integers<count>(weights, part, y + t * y_stride, y_stride);
  });
}

void to_bfloat16(const MatrixView& m, const float* x, uint16_t* to, float* step) {
  for (int64_t c = 0; c < m.chunk_columns; c += 16)  // these floats came from bfloat16: nothing is cut off
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to + c),
        _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(_mm512_loadu_ps(x + c)), 16)));
  *step = 1.0f;
}

// The weights of one column of a group, in the lanes of two sums: what the column's unit vector meets.
template <bool Bfloat16, typename Form, typename Index>
STBLLM_INLINE void look_up_weights(const Form& form, const Index& index, const uint8_t* table,
                                   __m512i (&weights)[2]) {
  weights[0] = weights[1] = _mm512_setzero_si512();
  constexpr bool kSigned = std::is_same_v<Form, Bytes<true>>;
  if constexpr (Bfloat16 && kSigned) {  // the sign of bfloat16 is a bit
    Index positive = index;
    positive.negative[0] = positive.negative[1] = 0;
    form.add(positive, form.load_table(table), weights);
    for (int half = 0; half < 2; ++half)
      weights[half] =
          _mm512_xor_si512(weights[half], _mm512_maskz_set1_epi16(index.negative[half], INT16_MIN));
  } else {
    form.add(index, form.load_table(table), weights);
  }
}

// (pairs of columns, 64 rows, 2) from a lookup form. Even lanes of the first sum are rows 0..15 of the tile,
// odd ones rows 16..31.
template <bool Bfloat16>
STBLLM_INLINE void decode_lookup_pairs(const MatrixView& m, int64_t tile, int64_t chunk, int sum,
                                       uint16_t* panel) {
  const uint8_t* const tables =
      (Bfloat16 ? m.bfloat16_tables : m.integer_tables) + sum * m.group * m.table_bytes;
  Strip strip = strip_of(m, chunk, tile - tile % m.strip_tiles);
  strip.first = tile % m.strip_tiles;
  with_form(m, [&](const auto& form, auto, auto) {
    form.template for_each_group<1>(
        strip, kChunkColumns / m.group, [&](int g, const auto& index) __attribute__((always_inline)) {
          for (int c = 0; c < m.group; c += 2) {
            __m512i even[2], odd[2];
            look_up_weights<Bfloat16>(form, index[0], tables + c * m.table_bytes, even);
            look_up_weights<Bfloat16>(form, index[0], tables + (c + 1) * m.table_bytes, odd);
            uint16_t* to = panel + (g * m.group + c) * kTileRows;
            for (int half = 0; half < 2; ++half, to += 64) {
              constexpr __mmask32 kOddLanes = 0xaaaaaaaa;
              _mm512_store_si512(
                  to, _mm512_mask_blend_epi16(kOddLanes, even[half], _mm512_slli_epi32(odd[half], 16)));
              _mm512_store_si512(
                  to + 32, _mm512_mask_blend_epi16(kOddLanes, _mm512_srli_epi32(even[half], 16), odd[half]));
            }
          }
        });
  });
}

// Integers of 8 bits as bfloat16, which holds them all.
STBLLM_INLINE __m512i bfloat16_bits(const int8_t* integers) {
  const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(integers));
  return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}

// The same from rows of integers.
template <bool Bfloat16>
STBLLM_INLINE void decode_row_pairs(const MatrixView& m, int64_t tile, int64_t chunk, uint16_t* panel) {
  alignas(64) int8_t symbols[kChunkColumns][kTileRows];
  decode_rows_by_shuffles(m, tile, chunk, symbols);
  for (int64_t c = 0; c < m.chunk_columns; c += 2)
    for (int row = 0; row < kTileRows; row += 16) {
      const int8_t *even = symbols[c] + row, *odd = symbols[c + 1] + row;
      __m512i pairs;
      if constexpr (Bfloat16) {
        pairs = _mm512_or_si512(_mm512_srli_epi32(bfloat16_bits(even), 16), bfloat16_bits(odd));
      } else {
        const __m128i a = _mm_load_si128(reinterpret_cast<const __m128i*>(even)),
                      b = _mm_load_si128(reinterpret_cast<const __m128i*>(odd));
        pairs = _mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
      }
      _mm512_store_si512(panel + c * kTileRows + 2 * row, pairs);
    }
}

template <bool Bfloat16>
void decode_words(const MatrixView& m, int64_t tile, int64_t chunk, int sum, uint16_t* panel, float* scales) {
  if (m.form == CodeForm::kRows)
    decode_row_pairs<Bfloat16>(m, tile, chunk, panel);
  else
    decode_lookup_pairs<Bfloat16>(m, tile, chunk, sum, panel);
  const float unit = m.form == CodeForm::kRows ? 1.0f : Bfloat16 ? m.bfloat16_unit : m.integer_unit;
  for (int v = 0; v < 4; ++v) {
    const int64_t row = tile * kTileRows + 16 * v;
    __m512 scale = _mm512_mul_ps(load_scales(m, chunk / m.chunks_per_block, sum, row), _mm512_set1_ps(unit));
    if (m.row_scales != nullptr)
      scale = _mm512_mul_ps(scale, _mm512_mul_ps(_mm512_load_ps(m.row_scales + row),
                                                 _mm512_set1_ps(m.levels == 1 ? m.level[0] : 1.0f)));
    _mm512_store_ps(scales + 16 * v, scale);
  }
}

constexpr WordKernels kIntegers = {
    .token_step = 1,
    .share_tokens = 4 * kPassTokens,
    .arrange = to_integers,
    .decode = decode_words<false>,
    .multiply = multiply_integers,
};

// Tiles of AMX hold 16 tokens; two of them at a time share the loading of weights.
constexpr WordKernels kBfloat16 = {
    .token_step = 16,
    .share_tokens = 32,
    .arrange = to_bfloat16,
    .decode = decode_words<true>,
    .multiply = multiply_tiles,
};

constexpr Kernels kernels_named(const char* name, const WordKernels* bfloat16) {
  return {
      .name = name,
      .can_look_up = can_look_up,
      .decode = decode,
      .decode_apart = decode_apart,
      .multiply = multiply,
      .integers = &kIntegers,
      .bfloat16 = bfloat16,
      .multiply_rows = multiply_rows,
      .tabulate = tabulate,
      .look_up = look_up,
      .load_floats = load_floats,
      .store_floats = store_floats,
  };
}

}  // namespace

constinit const Kernels kAvx512Kernels = kernels_named("cpu-avx512", nullptr);
constinit const Kernels kAmxKernels = kernels_named("cpu-amx", &kBfloat16);

}  // namespace stbllm::cpu
