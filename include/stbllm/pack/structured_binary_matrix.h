#pragma once
// The weight of one linear as structured binary planes. FORMAT.md is the specification; this file is its
// arithmetic.
//
// A row is cut into groups of M consecutive columns (the last group is padded with virtual columns). Every
// group keeps exactly N positions and stores one code, an index over all (support, levels, signs):
//
//   code = (rank(support) * L^N + sum_k level_k L^k) * 2^N + sum_k sign_k 2^k     k = 0..N-1, ascending
//   rank(p_0 < p_1 < ...) = sum_k C(p_k, k+1)                                     colexicographic
//
// and a kept weight is  (sign ? -1 : +1) * scale(row, column / column_block, level).
// A weight of a salient column has level 0 in its code and a second sign; where it is kept it is
// +-scale(row, block, L) +- scale(row, block, L + 1). Outlier columns are fp16 values, whatever the codes
// say.

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/base/nm_pattern.h"

namespace stbllm {

/// The shape of a matrix and the arrangement of its planes: everything that decides how many bytes each has.
struct Layout {
  int64_t rows = 0;  ///< out features
  int64_t cols = 0;  ///< in features
  NmPattern nm;
  int levels = 1;          ///< L, the magnitudes a kept weight can have: 1, 2 or 3
  int column_block = 128;  ///< columns that share scales; a multiple of M
  int scale_bits = 16;     ///< the coding of scales: at 16 an fp16 per (row, column block, slot); at 4..6 a
                           ///< scale code per (row, column block), times an fp16 per row and one per slot
  int64_t salient = 0;     ///< columns with a second sign
  int64_t outliers = 0;    ///< columns stored in fp16

  bool operator==(const Layout&) const = default;

  int64_t groups() const;          ///< per row, = ceil(cols / M)
  uint64_t code_states() const;    ///< C(M, N) (2 L)^N
  int code_bits() const;           ///< 3 (1:4) .. 44 (14:16 with three levels)
  int64_t code_row_bytes() const;  ///< of the codes of a row, which start at a byte
  int64_t column_blocks() const;   ///< = ceil(cols / column_block)
  int scale_slots() const { return levels + (salient > 0 ? 2 : 0); }
  int64_t scale_code_row_bytes() const;

  /// Throws Error(kCorrupt) naming `what` when a field is out of range.
  void validate(std::string_view what) const;
};

/// The bit arrays of a matrix. Multi-byte elements are little-endian.
enum class Plane {
  kCodes,           ///< U8  (rows, code_row_bytes): group codes, code_bits each
  kScales,          ///< F16 (rows, column_blocks, scale_slots)      if scale_bits == 16
  kScaleCodes,      ///< U8  (rows, scale_code_row_bytes)            if scale_bits < 16
  kRowScales,       ///< F16 (rows)                                  if scale_bits < 16
  kLevels,          ///< F16 (scale_slots)                           if scale_bits < 16
  kSalientColumns,  ///< I32 (salient), ascending
  kSalientSigns,    ///< U8  (salient, ceil(rows / 8)): second signs, 1 = negative
  kOutlierColumns,  ///< I32 (outliers), ascending
  kOutlierValues,   ///< F16 (outliers, rows)
};
inline constexpr int kPlaneCount = 9;
/// The tensor name suffix of a plane ("codes", "scales", ...), its safetensors dtype and its shape.
std::string_view plane_name(Plane plane);
std::string_view plane_dtype(Plane plane);
std::vector<int64_t> plane_shape(const Layout& layout, Plane plane);
/// Bytes of the plane; 0 when the layout has none.
int64_t plane_bytes(const Layout& layout, Plane plane);
int64_t layout_bytes(const Layout& layout);  ///< of all planes

/// What a code says of its group: the kept positions (ascending), their levels and their signs. Only the
/// first N entries count.
struct GroupSymbols {
  std::array<uint8_t, 16> position{};
  std::array<uint8_t, 16> level{};
  std::array<uint8_t, 16> sign{};  ///< 1 = negative
};
/// The code of a group, and back. Codes are below code_states(); symbols outside their ranges are a
/// std::logic_error.
uint64_t encode_group(NmPattern nm, int levels, const GroupSymbols& symbols);
GroupSymbols decode_group(NmPattern nm, int levels, uint64_t code);

/// A view of the planes of one matrix plus whatever keeps them alive. Cheap to copy.
class StructuredBinaryMatrix {
 public:
  using Planes = std::array<std::span<const std::byte>, kPlaneCount>;

  StructuredBinaryMatrix() = default;
  /// Checks everything that FORMAT.md asks of a matrix: sizes, ranges of codes, padding, unused bits, lists
  /// of columns (ascending, in range, aligned to 4 bytes) and scales (finite, not negative). Throws
  /// Error(kCorrupt) naming `what`. Planes that the layout lacks are empty; `owner` keeps the bytes alive.
  StructuredBinaryMatrix(const Layout& layout, Planes planes, std::shared_ptr<const void> owner,
                         std::string_view what);

  const Layout& layout() const { return layout_; }
  std::span<const std::byte> plane(Plane plane) const { return planes_[static_cast<size_t>(plane)]; }

  uint64_t code(int64_t row, int64_t group) const;
  /// fp16 scale, or row_scale * factor of the scale code * levels[slot] multiplied left to right in float32.
  float scale(int64_t row, int64_t column_block, int slot) const;
  std::span<const int32_t> salient_columns() const;
  std::span<const int32_t> outlier_columns() const;
  bool salient_sign(int64_t index, int64_t row) const;
  float outlier_value(int64_t index, int64_t row) const;

  /// The weight at (row, col). This is the decode rule of FORMAT.md, word for word, and slow.
  float at(int64_t row, int64_t col) const;
  /// Writes the `cols` weights of `row` to `out`; they equal at() of each column.
  void decode_row(int64_t row, float* out) const;

  /// Bytes of all planes.
  int64_t bytes() const;
  /// bytes() * 8 / (rows * cols)
  double stored_bits() const;

 private:
  /// What is wrong with the planes of `row`; empty when nothing is.
  std::string row_fault(int64_t row) const;

  Layout layout_;
  Planes planes_{};
  std::shared_ptr<const void> owner_;
  int code_bits_ = 0;  // layout_ computes these two anew at every call
  int64_t code_row_bytes_ = 0;
  const uint8_t* symbols_ = nullptr;  // the decode table of (nm, levels), or null when it would be too large
};

}  // namespace stbllm
