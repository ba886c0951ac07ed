#pragma once
// From the planes of the file (FORMAT.md) to records (device_layout.h). This runs once per matrix; every lane
// of every tile is one thread that decodes the codes it needs, plainly. Its slow twin is
// StructuredBinaryMatrix::at().

#include "device_layout.h"
#include "ptx.cuh"
#include "stbllm/base/bits.h"

namespace stbllm::cuda {

/// At most 57 bits of a little-endian bit stream; touches only the bytes that hold them.
STBLLM_DEVICE uint64_t read_stream(const uint8_t* stream, int64_t offset, int width) {
  uint64_t value = 0;
  const int64_t first = offset / 8, end = (offset + width + 7) / 8;
  for (int64_t i = first; i < end; ++i) value |= static_cast<uint64_t>(stream[i]) << (8 * (i - first));
  return value >> (offset % 8) & ((uint64_t{1} << width) - 1);
}

STBLLM_DEVICE uint64_t code_at(const PlaneView& planes, int row, int group) {
  return read_stream(planes.codes + row * planes.code_row_bytes,
                     static_cast<int64_t>(group) * planes.code_bits, planes.code_bits);
}

STBLLM_DEVICE float scale_at(const PlaneView& planes, int row, int block, int slot) {
  if (planes.scale_bits == 16) {
    const int64_t index =
        (static_cast<int64_t>(row) * planes.column_blocks + block) * planes.scale_slots + slot;
    return half_to_float(planes.scales[index]);
  }
  const uint64_t code = read_stream(planes.scale_codes + row * planes.scale_code_row_bytes,
                                    static_cast<int64_t>(block) * planes.scale_bits, planes.scale_bits);
  return half_to_float(planes.row_scales[row]) * planes.scale_factors[code] *
         half_to_float(planes.level_values[slot]);
}

/// A group by position instead of by kept weight.
struct GroupContent {
  uint32_t kept = 0;      ///< bit p: position p is kept
  uint32_t negative = 0;  ///< bit p
  uint32_t level = 0;     ///< bits 2 p, 2 p + 1

  STBLLM_DEVICE bool is_kept(int p) const { return kept >> p & 1u; }
  STBLLM_DEVICE uint32_t sign(int p) const { return negative >> p & 1u; }
  STBLLM_DEVICE int level_of(int p) const { return static_cast<int>(level >> (2 * p) & 3u); }
};

STBLLM_DEVICE GroupContent decode_code(int keep, int group, int levels, uint64_t code) {
  uint64_t weight = 1;  // of the support's rank
  for (int k = 0; k < keep; ++k) weight *= static_cast<uint64_t>(levels);
  const auto signs = static_cast<uint32_t>(code);
  uint64_t level_digits = (code >> keep) % weight;
  auto rank = static_cast<int64_t>((code >> keep) / weight);

  GroupContent content;
  // The k-th kept position is the largest p with C(p, k) <= rank.
  for (int p = group - 1, k = keep; k > 0; --p)
    if (binomial(p, k) <= rank) {
      rank -= binomial(p, k);
      weight /= static_cast<uint64_t>(levels);
      --k;
      content.kept |= 1u << p;
      content.negative |= (signs >> k & 1u) << p;
      content.level |= static_cast<uint32_t>(level_digits / weight) << (2 * p);
      level_digits %= weight;
    }
  return content;
}

/// The group content from source column `column` on (a multiple of 2; of 4 for whole fours); nothing is kept
/// outside the matrix.
STBLLM_DEVICE GroupContent content_at(const PlaneView& planes, int row, int column) {
  if (row >= planes.rows || column < 0) return {};
  const int shift = column % planes.group;
  GroupContent content =
      decode_code(planes.keep, planes.group, planes.levels, code_at(planes, row, column / planes.group));
  content.kept >>= shift;
  content.negative >>= shift;
  content.level >>= 2 * shift;
  return content;
}

/// The two values a sparse tile stores of four columns: the kept ones, and "zero" at free positions.
struct StoredFour {
  int position[2];

  STBLLM_DEVICE explicit StoredFour(uint32_t kept) {
    int count = 0;
    for (int p = 0; p < 4; ++p)
      if (kept >> p & 1u) position[count++] = p;
    if (count == 0) position[0] = 0, position[1] = 1;
    if (count == 1) {
      const int only = position[0];
      position[0] = only == 0 ? 0 : only - 1;
      position[1] = only == 0 ? 1 : only;
    }
  }
  /// Colexicographic index of the two positions, 0..5.
  STBLLM_DEVICE uint32_t support() const {
    return static_cast<uint32_t>(position[0] + position[1] * (position[1] - 1) / 2);
  }
};

/// The row inside a tile of a fragment row.
STBLLM_HOST_DEVICE constexpr int tile_row(int fragment_row) {
  return 2 * (fragment_row % 8) + fragment_row / 8;
}

inline constexpr int kRepackThreads = 128;  ///< one warp per tile

/// Writes the records of tiles 4 block_x() .. + 3.
STBLLM_DEVICE void repack_tiles(const PlaneView& planes, const WeightView& weights, uint32_t* records) {
  const int64_t tile = static_cast<int64_t>(block_x()) * (kRepackThreads / 32) + thread_index() / 32;
  if (tile >= static_cast<int64_t>(weights.row_tiles) * weights.column_tiles) return;
  const int lane = thread_index() % 32;
  const int first_row = static_cast<int>(tile / weights.column_tiles) * kTileRows;
  const int first_column = static_cast<int>(tile % weights.column_tiles) * kTileColumns;
  const TileFormat format = weights.format;
  const auto content = [&](int fragment_row, int column) {
    return content_at(planes, first_row + tile_row(fragment_row),
                      weights.source_column(first_column + column));
  };

  uint32_t words[12] = {};
  // Value `half` of register pair `pair` of this lane: bit pair % 16 + 16 half of word pair / 16 of its
  // planes.
  const auto store_value = [&](int pair, int half, const GroupContent& c, int position) {
    const int magnitude = c.is_kept(position) ? c.level_of(position) : planes.levels;
    uint32_t* word = words + format.support_words() + pair / 16;
    const int bit = pair % 16 + 16 * half;
    *word |= c.sign(position) << bit;
    for (int b = 0; b < format.level_planes; ++b)
      word[(1 + b) * format.plane_words()] |= static_cast<uint32_t>(magnitude >> b & 1) << bit;
  };

  if (format.sparse) {
    for (int pair = 0; pair < 32; ++pair) {  // 8 steps of 32 columns, 4 registers each
      const Element e = a_element(lane, pair % 4, 0);
      const GroupContent c = content(e.row, 32 * (pair / 4) + 2 * e.col);
      const StoredFour four(c.kept & 15u);
      for (int half = 0; half < 2; ++half) store_value(pair, half, c, four.position[half]);
    }
    // Words 0..2 hold the supports of 64 columns each in the lower three bits of their nibbles, the fourth
    // bits together those of the last 64 columns. A nibble is stored where expand_metadata() wants it.
    for (int chunk = 0; chunk < 4; ++chunk)
      for (int n = 0; n < 8; ++n) {
        const int row = lane / 4 + 8 * (n / 4), q = 4 * (lane % 2) + n % 4;
        const int step = 2 * chunk + lane % 4 / 2;  // of 32 columns; its parity is the selector
        const uint32_t support = StoredFour(content(row, 32 * step + 4 * q).kept & 15u).support();
        const int nibble = 4 * (n / 2 + 4 * (n % 2));
        if (chunk < 3) words[chunk] |= support << nibble;
        if (chunk == 3)
          for (int b = 0; b < 3; ++b) words[b] |= (support >> b & 1u) << (nibble + 3);
      }
  } else {
    for (int pair = 0; pair < 64; ++pair) {  // 16 steps of 16 columns, 4 registers each
      const Element e = a_element(lane, pair % 4, 0);
      const GroupContent c = content(e.row, 16 * (pair / 4) + e.col);
      for (int half = 0; half < 2; ++half) store_value(pair, half, c, half);
    }
  }

  uint32_t* record = records + tile * weights.record_words;
  for (int w = 0; w < format.lane_words(); ++w) record[32 * w + lane] = words[w];
  uint32_t* scales = record + 32 * format.lane_words();
  for (int w = lane; w < 16 * planes.levels; w += 32) {
    const int level = w / 16,
              block = (first_column + kScaleColumns * (w / 8 % 2)) / weights.padded_column_block;
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 2 * (w % 8) + half;
      if (row < planes.rows && block < planes.column_blocks)
        pair |=
            static_cast<uint32_t>(float_to_half(scale_at(planes, row, block, level) * planes.inverse_scale))
            << (16 * half);
    }
    scales[w] = pair;
  }
}

/// The weight of a salient column: two signed scales where the group keeps it.
STBLLM_DEVICE float salient_weight(const PlaneView& planes, int index, int row) {
  const int column = planes.salient_columns[index], block = column / planes.column_block;
  const GroupContent c = content_at(planes, row, column);
  if (!c.is_kept(0)) return 0.0f;
  const uint8_t signs = planes.salient_signs[static_cast<int64_t>(index) * ((planes.rows + 7) / 8) + row / 8];
  const float first = scale_at(planes, row, block, planes.levels);
  const float second = scale_at(planes, row, block, planes.levels + 1);
  return (c.sign(0) ? -first : first) + (signs >> (row % 8) & 1 ? -second : second);
}

/// Writes the fragments of extra step 4 block_x() .. + 3, counted over all row tiles: outliers, then salient
/// columns.
STBLLM_DEVICE void repack_extra(const PlaneView& planes, const WeightView& weights, uint32_t* values) {
  const int64_t index = static_cast<int64_t>(block_x()) * (kRepackThreads / 32) + thread_index() / 32;
  if (index >= static_cast<int64_t>(weights.row_tiles) * weights.extra_steps) return;
  const int lane = thread_index() % 32;
  const int first_row = static_cast<int>(index / weights.extra_steps) * kTileRows;
  const int first_column = static_cast<int>(index % weights.extra_steps) * kExtraColumns;
  for (int reg = 0; reg < 4; ++reg) {
    uint32_t pair = 0;
    for (int half = 0; half < 2; ++half) {
      const Element e = a_element(lane, reg, half);
      const int row = first_row + tile_row(e.row), extra = first_column + e.col;
      float value = 0.0f;
      if (row < planes.rows && extra < planes.outliers)
        value = half_to_float(planes.outlier_values[static_cast<int64_t>(extra) * planes.rows + row]);
      else if (row < planes.rows && extra < planes.outliers + planes.salient)
        value = salient_weight(planes, extra - planes.outliers, row);
      pair |= static_cast<uint32_t>(float_to_half(value * planes.inverse_scale)) << (16 * half);
    }
    values[(index * 32 + lane) * 4 + reg] = pair;
  }
}

}  // namespace stbllm::cuda
