#pragma once
// How a matrix lies in device memory.
//
// It is cut into tiles of 16 rows x 256 columns, and every tile is one record, in the order the kernels
// stream them: tile (i, j) at (i * column_tiles + j) * record_words. A record holds what each of the 32 lanes
// of a warp needs to build its own A fragments with no exchange between lanes, as words [w][lane], then the
// scales:
//
//   support   3 words, sparse tiles only  positions kept of 4 columns, 3 bits each
//   signs     2 words (sparse) or 4       one bit per stored value
//   levels    0..2 planes like `signs`    bit b of the magnitude index of each stored value
//   scales    levels x 2 x 8 words        fp16 pairs (tile row 2 g, 2 g + 1) per level, 128 columns and g
//
// *Sparse* tiles store two values of every four columns: 2:4 as it is, and every layout that keeps at most
// two of a group, with magnitude "zero" where fewer are kept. *Dense* tiles store all values, with magnitude
// "zero" where none is kept. "Zero" is one more magnitude, so a tile has L or L + 1 magnitudes and
// bits_for(that) level planes.
//
//   bits per weight = ((sparse ? 3 + 2 : 4) + (sparse ? 2 : 4) * planes) / 4 + levels / 8
//     2:4: 1.25 + 0.125     2:4, 3 levels: 2.25 + 0.375     1:4, 1:8, 2:8: 1.75 + 0.125
//     N of 8 or 16: 2 + 0.125     8:8: 1 + 0.125     N of 8, 3 levels: 3 + 0.375
//
// Fragment row g of a tile is tile row 2 g and fragment row g + 8 is tile row 2 g + 1, so that a lane's
// results are neighbours in memory. Columns of a column block whose size is no multiple of 128 are padded to
// one.
//
// Salient and outlier columns are *extra columns*: whole columns of fp16 values at the end of K, in A
// fragments of m16n8k16. Their place among the tiles sees an activation of zero.
//
// Values are stored times 2^-scale_exponent, chosen so that the largest is near 2^13: fp16 then holds
// scales that are codes to 11 bits whatever their range, and fp16 scales as they are.

#include <cstdint>

#include "fragments.h"
#include "stbllm/backend/backend.h"

namespace stbllm::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kTileColumns = 256;
inline constexpr int kScaleColumns = 128;  ///< columns that share scales in device memory
inline constexpr int kChunkColumns = 64;   ///< columns per step of the kernels: one support word
inline constexpr int kExtraColumns = 16;   ///< extra columns per step: K of m16n8k16

/// Words per lane of a tile.
struct TileFormat {
  bool sparse;
  int level_planes;

  STBLLM_HOST_DEVICE constexpr int support_words() const { return sparse ? 3 : 0; }
  STBLLM_HOST_DEVICE constexpr int plane_words() const { return sparse ? 2 : 4; }
  STBLLM_HOST_DEVICE constexpr int lane_words() const {
    return support_words() + plane_words() * (1 + level_planes);
  }
};

/// A prepared matrix as kernels see it. Pointers are device memory.
struct WeightView {
  TileFormat format;
  int rows, cols;
  int column_block;         ///< source columns that share scales
  int padded_column_block;  ///< the same in device columns, a multiple of 128
  int levels;               ///< scales per row and 128 columns
  int row_tiles, column_tiles;
  int record_words;
  int extra_steps;               ///< of 16 columns
  const uint32_t* records;       ///< (row_tiles, column_tiles, record_words)
  const uint32_t* extra_values;  ///< (row_tiles, extra_steps, 32 lanes, 4): A fragments
  const int32_t* extra_columns;  ///< (16 extra_steps): source column, -1 beyond the last
  const uint8_t* taken;          ///< (32 column_tiles): bit per device column, 1 = an extra column has it
  float scale;                   ///< 2^scale_exponent

  /// The source column of a device column; -1 for padding.
  STBLLM_HOST_DEVICE int source_column(int column) const {
    const int block = column / padded_column_block, offset = column % padded_column_block;
    const int source = block * column_block + offset;
    return offset < column_block && source < cols ? source : -1;
  }
};

/// The planes of a matrix (FORMAT.md) in device memory and the numbers that locate a weight in them.
struct PlaneView {
  int rows, cols;
  int keep, group, levels;
  int column_block, column_blocks, scale_slots, scale_bits;
  int code_bits;
  int64_t code_row_bytes, scale_code_row_bytes;
  int salient, outliers;
  float inverse_scale;      ///< 2^-scale_exponent
  float scale_factors[64];  ///< by scale code
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* scale_codes;
  const uint16_t* row_scales;
  const uint16_t* level_values;
  const int32_t* salient_columns;
  const uint8_t* salient_signs;
  const uint16_t* outlier_values;
};

struct InputView {
  const void* data;  // (tokens, cols)
  ElementType type;
  int tokens;
  bool aligned;  ///< eight device columns from a multiple of 8 on lie together at a multiple of 16 bytes
};

struct OutputView {
  void* data;  // (tokens, rows), at a multiple of 4 bytes
  ElementType type;
  int tokens;
};

/// The most that WeightView::record_words may be: with three levels.
constexpr int most_record_words(bool sparse, int level_planes) {
  return 32 * TileFormat{sparse, level_planes}.lane_words() + 16 * 3;
}

/// Columns of staged activations: the tiles, then the extra columns up to a whole chunk.
STBLLM_HOST_DEVICE inline int staged_width(const WeightView& weights) {
  const int extra = (weights.extra_steps * kExtraColumns + kChunkColumns - 1) / kChunkColumns * kChunkColumns;
  return weights.column_tiles * kTileColumns + extra;
}

}  // namespace stbllm::cuda
