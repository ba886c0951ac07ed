#pragma once
// A dense matrix (embedding, head) as rows of 8- or 4-bit integers. FORMAT.md is the specification.
//
//   weight(row, col) = scale(row, col / 64) * q(row, col)    q in -128..127 or -8..7, scale in fp16
//
// With its scales a weight takes 8.25 or 4.25 bits.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

namespace stbllm {

class QuantizedRows {
 public:
  static constexpr int kColumnBlock = 64;  ///< columns that share a scale

  struct Layout {
    int64_t rows = 0, cols = 0;
    int bits = 8;  ///< 8 or 4

    bool operator==(const Layout&) const = default;
    int64_t code_row_bytes() const;  ///< = ceil(cols * bits / 8); an even column is the low half of a byte
    int64_t column_blocks() const;   ///< = ceil(cols / 64)
    /// Throws Error(kCorrupt) naming `what` when a field is out of range.
    void validate(std::string_view what) const;
  };

  QuantizedRows() = default;
  /// A view of integers (rows, code_row_bytes) and fp16 scales (rows, column_blocks), which `owner` keeps
  /// alive. Throws Error(kCorrupt) naming `what` unless sizes fit, unused bits are 0 and scales are finite.
  QuantizedRows(const Layout& layout, std::span<const std::byte> codes, std::span<const std::byte> scales,
                std::shared_ptr<const void> owner, std::string_view what);

  /// Writes the `cols` weights of a row to `out`. Called from several threads at once; what it throws ends
  /// encode().
  using LoadRow = std::function<void(int64_t row, float* out)>;
  /// Integers and scales with a small squared error. At 8 bits a scale follows from the largest magnitude of
  /// its columns, at 4 bits from a search. Throws Error(kUnsupported) naming `what` when a weight is not
  /// finite or too large for fp16 scales.
  static QuantizedRows encode(const Layout& layout, const LoadRow& load_row, std::string_view what);

  /// integers: (rows, cols), each within the range of `layout`; scales: (rows, column_blocks) in fp16,
  /// finite.
  static QuantizedRows pack(const Layout& layout, std::span<const int8_t> integers,
                            std::span<const uint16_t> scales, std::string_view what);

  const Layout& layout() const { return layout_; }
  std::span<const std::byte> codes() const { return codes_; }
  std::span<const std::byte> scales() const { return scales_; }
  int64_t bytes() const { return std::ssize(codes_) + std::ssize(scales_); }

  int integer(int64_t row, int64_t col) const;           ///< q
  float scale(int64_t row, int64_t column_block) const;  ///< that of 64 columns, which fp16 holds exactly
  /// Writes the `cols` weights of `row` to `out`.
  void decode_row(int64_t row, float* out) const;

 private:
  Layout layout_;
  std::span<const std::byte> codes_, scales_;
  std::shared_ptr<const void> owner_;
};

}  // namespace stbllm
