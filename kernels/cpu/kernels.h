#pragma once
// What every instruction set provides, and the matrix as its kernels see it. README.md tells how the parts
// fit together.
//
// Files that include this are compiled for different machines, so it holds plain data only: an inline
// function or a container here could be compiled with AVX and then be chosen by the linker for everyone.
// (What is always inlined, like lanes.h, could not.)

#include <cstdint>

namespace stbllm::cpu {

/// Rows that are decoded together: one byte each fills a 512-bit register.
inline constexpr int kTileRows = 64;
/// The most columns that are decoded together; a chunk never straddles a column block.
inline constexpr int kChunkColumns = 128;
/// Up to so many tokens, rows of integers are multiplied without being decoded to panels.
inline constexpr int kFewTokens = 8;
/// The most scales per row and column block: three levels and two for salient columns.
inline constexpr int kMaxLevels = 3, kMaxSlots = kMaxLevels + 2;

/// How prepare() stores the codes of groups.
enum class CodeForm {
  /// As in the file, row after row.
  kPlane,
  /// 16-bit words that are interleaved over the rows of a tile. They hold the bits of the file (codes of 3 to
  /// 7
  /// bits), or the symbols of a few columns as a number.
  kWords,
  /// One byte per group, with `signs` also a bit that negates the group: codes of 8 or 9 bits.
  kBytes,
  /// Groups of eight as two halves of four: a 7-bit index, and 5 bits relative to it.
  kHalves,
  /// Four bits for the symbols of two columns, of one column where there are two or three levels.
  kNibbles,
  /// QuantizedRows: an integer per weight, as in the file.
  kRows,
};

/// A table entry is a sum of sources: column c of the group at level l is source l * group + c, its negative
/// 32 more.
inline constexpr int kNegative = 32;
inline constexpr int kNoSource = 31;  ///< always 0, so group * levels must stay below 32

inline constexpr int kPruned = 0x80;  ///< what a byte shuffle takes for zero

struct Divisor {
  uint64_t value, reciprocal;  ///< reciprocal = (2^64 - 1) / value, rounded down
};

/// A prepared matrix. Rows and columns beyond the last are stored as zeros unless noted.
struct MatrixView {
  int64_t rows, cols;
  int64_t tiles;             ///< ceil(rows / 64)
  int64_t chunks;            ///< per row
  int64_t chunk_columns;     ///< 4..128; the lookup forms need 128, kRows has 64
  int64_t chunks_per_block;  ///< chunks that share scales
  int sums;                  ///< scaled apart in a row and block: 1, or levels where each has its own scales
  int keep, group, levels, code_bits;  ///< of a code in this form, which may be finer than those of the file
  int file_keep, file_group;

  CodeForm form;
  bool signs;
  int strip_tiles;  ///< tiles that are interleaved; the last strip may have fewer
  /// kPlane: (rows, code_row_bytes) and 8 bytes of slack. kRows: (rows, code_row_bytes), integers of
  /// code_bits, the even column in the low half of a byte. Otherwise (chunks, strips): what a pass over a
  /// strip of tiles reads, in that order, so that codes stream from memory. With n tiles in the strip:
  ///   kWords   (code_bits * groups / 16, 64) words of 16 bits, n = 1
  ///   kBytes   (groups, n, 64) bytes, then with signs (groups, n, 64) bits
  ///   kHalves  (groups / 2, 3, n, 64) bytes: left index and top right bit of an even and an odd group, 4 + 4
  ///   right bits
  ///   kNibbles (groups / 2, 64) bytes, n = 1: an even group below an odd one; rows in order
  const uint8_t* codes;
  int64_t code_row_bytes;
  int64_t chunk_bytes;  ///< of one tile's chunk

  // For kPlane, what a code means: code = (rank * digit_states + digits) << keep | signs.
  const uint8_t* expand;       ///< (supports, 16): by column, its place among the kept ones, or kPruned
  const uint64_t* magnitudes;  ///< (levels^min(keep, 8)): level digits plus one, a byte each
  Divisor digit_states;        ///< levels^keep
  Divisor low_digit_states;    ///< levels^min(keep, 8)

  // For lookup forms: a group's table holds the contribution of every state to a dot product.
  int entries;          ///< per table
  int64_t table_bytes;  ///< entries * 2
  int term_count;
  const int16_t* terms;  ///< (term_count, entries): which sources each state adds up, see kNoSource
  /// The tables of the unit vectors, from which weights are decoded. They differ in what a level stands for:
  /// its number, counted from 1, in unit_tables (group, table_bytes); its multiple of integer_unit, rounded,
  /// in integer_tables (sums, group, table_bytes); and its multiple of bfloat16_unit as a bfloat16 number in
  /// bfloat16_tables, which are as many.
  const uint8_t *unit_tables, *integer_tables, *bfloat16_tables;
  float integer_unit, bfloat16_unit;
  const uint8_t* half_base;  ///< kHalves, (128): first right index by left index

  // scale(row, block, slot) = half scale, or row_scale * factor[code] * level[slot].
  int slots;
  const uint16_t* half_scales;  ///< (blocks, slots, tiles * 64), null where scales are codes, which are then:
  const uint8_t* scale_codes;   ///< (blocks, tiles * 64)
  const float* row_scales;      ///< (tiles * 64)
  int scale_bits;
  float factors[64];
  /// (sums, levels), in lookup forms: what a level counts in the tables of a sum. A level that is alone in
  /// its sum is 1 there and 0 in the others; of several in one sum each is its level[].
  float level_worth[kMaxLevels][kMaxLevels];
  float level[kMaxSlots];

  int64_t salient, outliers;
  const int32_t* salient_columns;
  const uint8_t* salient_signs;  ///< (salient, tiles * 8): of the second sign
  /// In lookup forms, (salient, tiles * 8): rows that keep the column, and those where its first sign is
  /// negative.
  const uint8_t *salient_kept, *salient_first_signs;
  const int32_t* outlier_columns;
  const uint16_t* outlier_values;  ///< (outliers, tiles * 64), fp16
};

/// Weights of a tile's chunk in 16 bits, and what these are to be multiplied by.
struct WordPanel {
  const uint16_t* panel;  ///< (pairs of columns, 64 rows, 2)
  const float* scales;    ///< (64)
  int64_t columns;
};

/// The activations of some tokens in 16 bits, and what these are to be multiplied by.
struct WordActivations {
  const uint16_t* x;   ///< (tokens, columns)
  const float* steps;  ///< (tokens)
  int64_t tokens;
};

/// Products of panels of 16-bit numbers, for all forms but kPlane. They leave out the columns apart.
struct WordKernels {
  /// Tokens that are multiplied at once: the number of a WordActivations is a multiple of token_step, and
  /// threads share a tile at multiples of share_tokens.
  int64_t token_step, share_tokens;
  /// A token's chunk in 16 bits. x is zero at columns apart, whose weights therefore do not matter, and
  /// behind the last column.
  void (*arrange)(const MatrixView&, const float* x, uint16_t* to, float* step);
  /// What WordPanel says, of one of the sums of a tile's chunk.
  void (*decode)(const MatrixView&, int64_t tile, int64_t chunk, int sum, uint16_t* panel, float* scales);
  /// y[t][0..63] += steps[t] * scales[0..63] * sum_c x[t][c] panel[c][0..63]
  void (*multiply)(const WordPanel&, const WordActivations&, float* y, int64_t y_stride);
};

/// One chunk of tiles [first_tile, last_tile), which begin at a strip, for some tokens.
struct LookupPass {
  int64_t chunk, first_tile, last_tile;
  int64_t sets;           ///< of tables, one for each token and, within it, each sum
  int64_t first_set;      ///< sets of the same tokens that went before these
  const uint8_t* tables;  ///< (sets, 128 / group, table_bytes)
  const float* steps;     ///< (sets)
  float* y;               ///< (tokens, y_stride), of set 0; row r of the matrix stands at r
  int64_t y_stride;
};

/// The kernels of one instruction set. Panels are (columns, 64): the weights of a tile, rows adjacent.
struct Kernels {
  const char* name;
  /// True when look_up() handles this form with tables of `entries`.
  bool (*can_look_up)(CodeForm form, int entries);

  /// panel = the weights of a tile's chunk in float32, all of at(): scales, salient and outlier columns.
  void (*decode)(const MatrixView&, int64_t tile, int64_t chunk, float* panel);
  /// panel (outliers + salient, 64) = the columns apart of a tile, which lookups and 16-bit panels leave out:
  /// the outlier columns, then the salient ones.
  void (*decode_apart)(const MatrixView&, int64_t tile, float* panel);
  /// y[t][0..63] += sum_c x[t][c] panel[c][0..63]; x has `columns` per token, y has `y_stride`.
  void (*multiply)(const float* panel, int64_t columns, const float* x, int64_t tokens, float* y,
                   int64_t y_stride);

  /// With activations on a grid of *step, a power of two, fine enough that no sum overflows, and with
  /// bfloat16 activations as they are. Null where the machine has no such product.
  const WordKernels *integers, *bfloat16;

  /// kRows, up to kFewTokens tokens: y[t][0..63] = the rows of a tile times x, whose chunks are in the order
  /// of the integers as they are loaded: column c of 64 stands at c % 4 * 16 + c / 4.
  void (*multiply_rows)(const MatrixView&, int64_t tile, const float* x, int64_t tokens, float* y);

  /// The tables of one sum of one token's chunk, in units of *step, a power of two: (128 / group,
  /// table_bytes). x holds 128 floats, zero at columns apart. Null where there are no lookups.
  void (*tabulate)(const MatrixView&, int sum, const float* x, uint8_t* tables, float* step);
  /// y[token][row] += step * scale * (sum of table entries), of each set, for the rows of some tiles; without
  /// the row scales, and without level[0] when that is the only level.
  void (*look_up)(const MatrixView&, const LookupPass&);

  void (*load_floats)(const uint16_t* from, bool half, int64_t count, float* to);
  void (*store_floats)(const float* from, bool half, int64_t count, uint16_t* to);
};

// Constants, so that a machine that cannot run them can still read them.
extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvxVnniKernels, kAvx512Kernels, kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

/// kernels_amx.cc: WordKernels::multiply for bfloat16, whose steps are all 1.
void multiply_tiles(const WordPanel&, const WordActivations&, float* y, int64_t y_stride);

}  // namespace stbllm::cpu
