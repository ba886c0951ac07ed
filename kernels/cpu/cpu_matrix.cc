#include "cpu_matrix.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <span>

#include "stbllm/base/bits.h"
#include "stbllm/base/parallel.h"
#include "stbllm/base/scale_codes.h"

namespace stbllm::cpu {
namespace {

uint64_t power(uint64_t base, int exponent) {
  uint64_t result = 1;
  while (exponent-- > 0) result *= base;
  return result;
}

Divisor divisor(uint64_t value) { return {value, ~uint64_t{0} / value}; }

// A form and the numbers that belong to it, see MatrixView.
struct FormPlan {
  CodeForm form = CodeForm::kPlane;
  NmPattern nm;
  int code_bits = 0;
  bool signs = false;
  bool digits = false;  // words that hold symbols in place of stored codes
  int entries = 0;
  int terms = 0;
};

constexpr int entries_of_words(int code_bits) { return code_bits <= 5 ? 32 : 1 << code_bits; }

// Lookups of the codes as they are, where their tables fit registers; kPlane where they do not.
FormPlan plan_lookups_of_codes(const Layout& layout) {
  FormPlan plan = {.nm = layout.nm, .code_bits = layout.code_bits(), .terms = layout.nm.keep};
  if (layout.levels == 1 && layout.nm.keep == layout.nm.group) {
    // Dense binary groups of 8 and 16 are groups of 4 written one after the other.
    plan.nm = {4, 4};
    plan.code_bits = plan.terms = 4;
  }
  if (plan.code_bits <= 7) {
    plan.form = CodeForm::kWords;
    plan.entries = entries_of_words(plan.code_bits);
    if (kChunkColumns / plan.nm.group % 16 != 0) plan.form = CodeForm::kPlane;
  } else if (plan.code_bits <= 9) {
    plan.form = CodeForm::kBytes;
    plan.signs = plan.code_bits == 9;
    plan.entries = 256;
  } else if (plan.nm.group == 8 && plan.nm.keep >= 4 && layout.levels == 1) {
    plan.form = CodeForm::kHalves;
    plan.entries = 256;
    plan.terms = 4;
  }
  if (plan.nm.group * layout.levels > kNoSource) plan.form = CodeForm::kPlane;
  return plan;
}

// Lookups for all other layouts: the symbols of four columns, of two where there are several levels, are
// digits of a number in base 1 + 2 levels. A digit is 0 where nothing is kept, else 1 + 2 level + sign. This
// costs 1.75, 2.5 or 3 bits a weight for 1, 2 or 3 levels.
FormPlan plan_lookups_of_digits(const Layout& layout) {
  const int columns = layout.levels == 1 ? 4 : 2;
  const int bits = bits_for(power(1 + 2 * static_cast<uint64_t>(layout.levels), columns));
  return {.form = CodeForm::kWords,
          .nm = {columns, columns},
          .code_bits = bits,
          .digits = true,
          .entries = entries_of_words(bits),
          .terms = columns};
}

// The same in tables of 16 entries: two columns with one level, one column with more. This costs 2 or 4 bits
// a weight.
FormPlan plan_nibbles(const Layout& layout) {
  const int columns = layout.levels == 1 ? 2 : 1;
  return {.form = CodeForm::kNibbles,
          .nm = {columns, columns},
          .code_bits = 4,
          .digits = true,
          .entries = 16,
          .terms = columns};
}

FormPlan choose_form(const Layout& layout, int64_t chunk_columns, const Kernels& kernels) {
  const FormPlan as_stored = {.nm = layout.nm, .code_bits = layout.code_bits()};
  if (chunk_columns != kChunkColumns) return as_stored;  // a sum of lookups spans a chunk and has one scale
  FormPlan plan = plan_lookups_of_codes(layout);
  if (plan.form == CodeForm::kPlane) plan = plan_lookups_of_digits(layout);
  if (!kernels.can_look_up(plan.form, plan.entries)) plan = plan_nibbles(layout);
  return kernels.can_look_up(plan.form, plan.entries) ? plan : as_stored;
}

// The widest chunk of at most 128 columns that divides a column block into whole groups.
int64_t choose_chunk_columns(const Layout& layout) {
  int64_t columns = std::min<int64_t>(layout.column_block, kChunkColumns / layout.nm.group * layout.nm.group);
  while (layout.column_block % columns != 0) columns -= layout.nm.group;
  return columns;
}

// --- levels as numbers of 16 bits ---

/// A power of two of which the largest level is 4096 .. 8191 multiples, so that an fp16 number is one of
/// them.
float integer_unit(std::span<const float> levels) {
  const float largest = std::ranges::max(levels);
  return largest > 0 ? std::ldexp(1.0f, std::ilogb(largest) - 12) : 1.0f;
}

/// A bfloat16 number keeps 8 bits of each level, but what one is worth is free: among 2048 units between 1/2
/// and 1, the one that loses the least of any level. No unit loses more than 2^-9 of one.
float bfloat16_unit(std::span<const float> levels) {
  constexpr int kUnits = 2048;
  float best = 1.0f, least = std::numeric_limits<float>::infinity();
  for (int i = 0; i < kUnits; ++i) {
    const float unit = static_cast<float>(kUnits) / static_cast<float>(kUnits + i);
    float most = 0;
    for (const float level : levels)
      if (level != 0)
        most = std::max(most,
                        std::fabs(bfloat16_to_float(float_to_bfloat16(level / unit)) * unit / level - 1.0f));
    if (most < least) {
      least = most;
      best = unit;
    }
  }
  return best;
}

int source_of(NmPattern nm, int level, int column, bool negative) {
  return level * nm.group + column + (negative ? kNegative : 0);
}

// --- halves of a group of eight ---

// The first of the states of four columns with one level that keep so many of them. There are 1, 8, 24, 32
// and 16 states with 0 to 4 kept.
constexpr std::array<int, 6> kHalfOffset = {0, 1, 9, 33, 65, 81};

struct Half {
  int kept = 0;
  int index = 0;  // among the states with as many kept
};

Half half_of(const GroupSymbols& group, int keep, int first_column) {
  Half half;
  GroupSymbols symbols;
  for (int k = 0; k < keep; ++k) {
    const int column = group.position[k] - first_column;
    if (column < 0 || column >= 4) continue;
    symbols.position[half.kept] = static_cast<uint8_t>(column);
    symbols.sign[half.kept++] = group.sign[k];
  }
  if (half.kept > 0) half.index = static_cast<int>(encode_group({half.kept, 4}, 1, symbols));
  return half;
}

// The left half of a group plus its offset in the lower seven bits, above them the right half without offset,
// which follows from the left one; by code.
std::vector<uint16_t> halves_of_codes(const Layout& layout) {
  std::vector<uint16_t> halves(layout.code_states());
  for (uint64_t code = 0; code < halves.size(); ++code) {
    const GroupSymbols group = decode_group(layout.nm, layout.levels, code);
    const Half left = half_of(group, layout.nm.keep, 0), right = half_of(group, layout.nm.keep, 4);
    halves[code] = static_cast<uint16_t>((kHalfOffset[left.kept] + left.index) | right.index << 7);
  }
  return halves;
}

// --- digits ---

// From a code to the words or nibbles that hold its symbols, `columns` of them each.
class DigitFields {
 public:
  DigitFields(const Layout& layout, int columns, int field_bits)
      : nm_(layout.nm), levels_(layout.levels), columns_(columns), field_bits_(field_bits) {
    if (layout.code_states() > kMaxTable) return;
    std::vector<uint64_t> table(layout.code_states());
    // A thread is worth its start from about 4096 codes on.
    parallel_for(std::ssize(table), 1 << 12, [&](int64_t begin, int64_t end) {
      for (int64_t code = begin; code < end; ++code) table[code] = fields(static_cast<uint64_t>(code));
    });
    table_ = std::move(table);
  }

  int bits() const { return nm_.group / columns_ * field_bits_; }
  uint64_t of(uint64_t code) const { return table_.empty() ? fields(code) : table_[code]; }

 private:
  static constexpr uint64_t kMaxTable = 1 << 18;  // 2 MiB, which is made faster than a matrix is repacked

  uint64_t fields(uint64_t code) const {
    const GroupSymbols group = decode_group(nm_, levels_, code);
    std::array<uint64_t, 16> symbol{};
    for (int k = 0; k < nm_.keep; ++k)
      symbol[group.position[k]] = 1 + 2 * uint64_t{group.level[k]} + group.sign[k];
    const uint64_t base = 1 + 2 * static_cast<uint64_t>(levels_);
    uint64_t packed = 0;
    for (int field = nm_.group / columns_ - 1; field >= 0; --field) {
      uint64_t number = 0;
      for (int column = columns_ - 1; column >= 0; --column)
        number = number * base + symbol[field * columns_ + column];
      packed = packed << field_bits_ | number;
    }
    return packed;
  }

  NmPattern nm_;
  int levels_, columns_, field_bits_;
  std::vector<uint64_t> table_;
};

// --- signed codes ---

// A code whose top sign is set stands for the negative of the code with all signs flipped. This is the code
// without that bit.
uint64_t unsigned_code(uint64_t code, int keep) {
  const uint64_t low = (uint64_t{1} << (keep - 1)) - 1;
  const bool negative = code >> (keep - 1) & 1;
  return code >> keep << (keep - 1) | ((negative ? ~code : code) & low);
}

// Register order of the rows of a tile in lookup forms. Each half of the tile has a register of 16-bit sums;
// there rows 0..15 are the even lanes and rows 16..31 the odd ones, so that two shifts split them into 32-bit
// lanes in row order.
int lane_of_row(int row) { return row % 16 * 2 + row % 32 / 16; }
// Where codes are bytes, unpacking them to words within 128-bit lanes must lead there.
int byte_of_row(int row) { return lane_of_row(row) / 8 * 16 + row / 32 * 8 + lane_of_row(row) % 8; }

// --- storing the codes of a row ---

// A row of a tile, one chunk of it, and the strip of tiles into which its codes go.
struct StripRow {
  int64_t row;  // of the matrix
  int64_t chunk;
  int in_tile;     // the row's place in its tile
  int64_t tile;    // the tile's place in its strip
  int64_t tiles;   // of the strip
  uint8_t* strip;  // the codes of this chunk

  int lane() const { return in_tile / 32 * 32 + lane_of_row(in_tile); }
  /// Bytes come in lines of 64 for each tile of the strip.
  int64_t line_bytes() const { return tiles * kTileRows; }
  /// The byte of this row in the first line.
  uint8_t* first_byte() const { return strip + tile * kTileRows + byte_of_row(in_tile); }
};

// What the loops below need stands in locals, because to a compiler a store to a byte may change anything
// else.

// kWords and kNibbles: the bits of the file, or `digits` in place of codes.
void store_words(const StructuredBinaryMatrix& matrix, const StripRow& at, const MatrixView& m,
                 const DigitFields* digits) {
  const Layout& layout = matrix.layout();
  const int64_t words = kChunkColumns / m.group * m.code_bits / 16;
  std::array<uint16_t, 32> line{};  // the row's chunk
  if (digits == nullptr) {
    const int64_t first = at.chunk * words * 2, row_bytes = layout.code_row_bytes();
    std::memcpy(line.data(), matrix.plane(Plane::kCodes).data() + at.row * row_bytes + first,
                static_cast<size_t>(std::min<int64_t>(words * 2, row_bytes - first)));
  } else {
    const int64_t groups = kChunkColumns / layout.nm.group, first = at.chunk * groups;
    const int64_t present = std::min(groups, layout.groups() - first);
    const int bits = digits->bits();
    for (int64_t g = 0; g < present; ++g)
      write_bits(reinterpret_cast<std::byte*>(line.data()), g * bits, bits,
                 digits->of(matrix.code(at.row, first + g)));
  }
  if (m.form == CodeForm::kWords) {
    uint8_t* const to = at.strip + 2 * at.lane();
    for (int64_t w = 0; w < words; ++w) std::memcpy(to + w * kTileRows * 2, &line[w], 2);
  } else {
    uint8_t* const to = at.strip + at.in_tile;
    const auto* const bytes = reinterpret_cast<const uint8_t*>(line.data());
    for (int64_t b = 0; b < 2 * words; ++b) to[b * kTileRows] = bytes[b];
  }
}

void store_bytes(const StructuredBinaryMatrix& matrix, const StripRow& at, const MatrixView& m) {
  const int64_t groups = kChunkColumns / m.group, first = at.chunk * groups;
  const int64_t present = std::min(groups, matrix.layout().groups() - first);
  const int64_t line_bytes = at.line_bytes();
  const int lane = at.lane(), keep = m.keep;
  const bool signs = m.signs;
  uint8_t* to = at.first_byte();
  uint8_t* to_signs = at.strip + groups * line_bytes + (at.tile * kTileRows + lane) / 8;
  for (int64_t g = 0; g < present; ++g, to += line_bytes, to_signs += line_bytes / 8) {
    const uint64_t code = matrix.code(at.row, first + g);
    *to = static_cast<uint8_t>(signs ? unsigned_code(code, keep) : code);
    if (signs && (code >> (keep - 1) & 1)) *to_signs |= static_cast<uint8_t>(1 << lane % 8);
  }
}

// Three lines hold the left halves of an even and an odd group, then the low bits of their right halves.
void store_halves(const StructuredBinaryMatrix& matrix, const StripRow& at,
                  const std::vector<uint16_t>& halves) {
  const int64_t groups = kChunkColumns / 8, first = at.chunk * groups;
  const int64_t present = std::min(groups, matrix.layout().groups() - first);
  const int64_t line_bytes = at.line_bytes();
  const uint16_t* const by_code = halves.data();
  uint8_t* const to = at.first_byte();
  for (int64_t g = 0; g < present; ++g) {
    const unsigned both = by_code[matrix.code(at.row, first + g)], right = both >> 7;
    uint8_t* const lines = to + g / 2 * 3 * line_bytes;
    lines[g % 2 * line_bytes] = static_cast<uint8_t>((both & 127) | right >> 4 << 7);
    lines[2 * line_bytes] |= static_cast<uint8_t>((right & 15) << 4 * (g % 2));
  }
}

template <typename T>
T* data_or_null(AlignedVector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

}  // namespace

CpuMatrix::CpuMatrix(const StructuredBinaryMatrix& matrix, const Kernels& kernels) : kernels_(kernels) {
  const Layout& layout = matrix.layout();
  MatrixView& m = view_;
  m.rows = layout.rows;
  m.cols = layout.cols;
  m.tiles = ceil_div(layout.rows, kTileRows);
  m.chunk_columns = choose_chunk_columns(layout);
  m.chunks = ceil_div(layout.cols, m.chunk_columns);
  m.chunks_per_block = layout.column_block / m.chunk_columns;
  m.levels = layout.levels;
  m.sums = layout.scale_bits == 16 ? layout.levels : 1;

  const FormPlan plan = choose_form(layout, m.chunk_columns, kernels);
  m.form = plan.form;
  m.keep = plan.nm.keep;
  m.group = plan.nm.group;
  m.code_bits = plan.code_bits;
  m.file_keep = layout.nm.keep;
  m.file_group = layout.nm.group;
  m.signs = plan.signs;
  m.entries = plan.entries;
  m.table_bytes = 2 * plan.entries;
  m.term_count = plan.terms;
  digits_ = plan.digits;

  prepare_scales(matrix);
  if (m.form == CodeForm::kPlane)
    prepare_plane(matrix);
  else
    prepare_lookups(matrix);
  prepare_columns(matrix);
}

CpuMatrix::CpuMatrix(QuantizedRows rows, const Kernels& kernels) : kernels_(kernels), rows_(std::move(rows)) {
  const QuantizedRows::Layout& layout = rows_.layout();
  MatrixView& m = view_;
  m.form = CodeForm::kRows;
  m.rows = layout.rows;
  m.cols = layout.cols;
  m.tiles = ceil_div(layout.rows, kTileRows);
  m.chunk_columns = QuantizedRows::kColumnBlock;
  m.chunks = layout.column_blocks();
  m.chunks_per_block = m.levels = m.slots = m.sums = 1;
  m.code_bits = layout.bits;
  m.codes = reinterpret_cast<const uint8_t*>(rows_.codes().data());
  m.code_row_bytes = layout.code_row_bytes();
  half_scales_.assign(static_cast<size_t>(m.chunks * m.tiles * kTileRows), 0);
  for (int64_t row = 0; row < m.rows; ++row)
    for (int64_t chunk = 0; chunk < m.chunks; ++chunk)
      std::memcpy(&half_scales_[chunk * m.tiles * kTileRows + row],
                  rows_.scales().data() + 2 * (row * m.chunks + chunk), 2);
  m.half_scales = half_scales_.data();
}

void CpuMatrix::prepare_plane(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  MatrixView& m = view_;
  const auto plane = matrix.plane(Plane::kCodes);
  codes_.resize(plane.size() + 8);
  std::memcpy(codes_.data(), plane.data(), plane.size());
  m.codes = codes_.data();
  m.code_row_bytes = layout.code_row_bytes();

  const NmPattern nm = layout.nm;
  const uint64_t levels = static_cast<uint64_t>(layout.levels);
  m.digit_states = divisor(power(levels, nm.keep));
  m.low_digit_states = divisor(power(levels, std::min(nm.keep, 8)));
  const int64_t supports = binomial(nm.group, nm.keep);
  expand_.assign(static_cast<size_t>(supports * 16), kPruned);
  for (int64_t rank = 0; rank < supports; ++rank) {
    const GroupSymbols group = decode_group(nm, 1, static_cast<uint64_t>(rank) << nm.keep);
    for (int k = 0; k < nm.keep; ++k) expand_[rank * 16 + group.position[k]] = static_cast<uint8_t>(k);
  }
  magnitudes_.resize(m.low_digit_states.value);
  for (uint64_t value = 0; value < magnitudes_.size(); ++value)
    for (uint64_t k = 0, rest = value; k < 8; ++k, rest /= levels)
      magnitudes_[value] |= (1 + rest % levels) << 8 * k;
  m.expand = expand_.data();
  m.magnitudes = magnitudes_.data();
}

void CpuMatrix::prepare_lookups(const StructuredBinaryMatrix& matrix) {
  make_terms();
  make_value_tables();
  store_codes(matrix);
  view_.codes = codes_.data();
  view_.terms = terms_.data();
  view_.unit_tables = unit_tables_.data();
  view_.integer_tables = data_or_null(integer_tables_);
  view_.bfloat16_tables = data_or_null(bfloat16_tables_);
  view_.half_base = data_or_null(half_base_);
}

/// What each table entry adds up.
void CpuMatrix::make_terms() {
  const MatrixView& m = view_;
  const NmPattern nm = {m.keep, m.group};
  terms_.assign(static_cast<size_t>(m.term_count * m.entries), kNoSource);
  const auto set_terms = [&](int entry, NmPattern pattern, int levels, uint64_t code, int first_column) {
    const GroupSymbols group = decode_group(pattern, levels, code);
    for (int k = 0; k < pattern.keep; ++k)
      terms_[k * m.entries + entry] = static_cast<int16_t>(
          source_of(nm, group.level[k], first_column + group.position[k], group.sign[k] != 0));
  };
  if (m.form == CodeForm::kHalves) {
    half_base_.assign(128, 0);
    for (int kept = 0; kept <= 4; ++kept)
      for (int entry = kHalfOffset[kept]; entry < kHalfOffset[kept + 1]; ++entry) {
        if (kept > 0)
          for (const int first_column : {0, 4})
            set_terms(first_column * 32 + entry, {kept, 4}, 1,
                      static_cast<uint64_t>(entry - kHalfOffset[kept]), first_column);
        if (const int rest = m.keep - kept; rest >= 0 && rest <= 4) half_base_[entry] = kHalfOffset[rest];
      }
  } else {
    const uint64_t states = binomial(nm.group, nm.keep) * power(2 * m.levels, nm.keep);
    const uint64_t base = 1 + 2 * static_cast<uint64_t>(m.levels);
    for (int entry = 0; entry < m.entries; ++entry) {
      uint64_t code = static_cast<uint64_t>(entry);
      if (m.signs)
        code = code >> (nm.keep - 1) << nm.keep | (code & ((uint64_t{1} << (nm.keep - 1)) - 1));
      else
        code &= (uint64_t{1} << m.code_bits) - 1;  // narrow words leave bits of the next code above the index
      if (!digits_) {
        if (code < states) set_terms(entry, nm, m.levels, code, 0);
        continue;
      }
      for (int column = 0; column < nm.group; ++column, code /= base)
        if (const int symbol = static_cast<int>(code % base); symbol > 0)
          terms_[column * m.entries + entry] =
              static_cast<int16_t>(source_of(nm, (symbol - 1) / 2, column, (symbol - 1) % 2 != 0));
    }
  }
}

/// For every sum, the table of a group whose column c has activation 1 and the others 0, for every c. A level
/// is worth the 16 bits of value_of_level(sum, level, negative).
template <typename Value>
AlignedVector<uint8_t> CpuMatrix::make_unit_tables(int sums, const Value& value_of_level) const {
  const MatrixView& m = view_;
  // Tables of byte shuffles keep the low and the high bytes of so many entries apart.
  const int apart = std::min(m.entries, 128);
  AlignedVector<uint8_t> tables(static_cast<size_t>(sums * m.group * m.table_bytes));
  const auto store_entry = [&](uint8_t* table, int entry, uint16_t value) {
    if (m.form == CodeForm::kWords) {
      std::memcpy(table + 2 * entry, &value, sizeof value);
    } else {
      uint8_t* low = table + entry / apart * 2 * apart + entry % apart;
      low[0] = static_cast<uint8_t>(value);
      low[apart] = static_cast<uint8_t>(value >> 8);
    }
  };
  for (int sum = 0; sum < sums; ++sum)
    for (int k = 0; k < m.term_count; ++k)
      for (int entry = 0; entry < m.entries; ++entry) {
        const int source = terms_[k * m.entries + entry], positive = source % kNegative;
        if (positive != kNoSource)
          store_entry(&tables[(sum * m.group + positive % m.group) * m.table_bytes], entry,
                      static_cast<uint16_t>(value_of_level(sum, positive / m.group, source >= kNegative)));
      }
  return tables;
}

/// Tables from which weights are decoded, in the numbers that the kernels multiply.
void CpuMatrix::make_value_tables() {
  MatrixView& m = view_;
  const auto signed_value = [](int magnitude, bool negative) { return negative ? -magnitude : magnitude; };
  for (int sum = 0; sum < m.sums; ++sum)
    for (int level = 0; level < m.levels; ++level)
      m.level_worth[sum][level] = m.sums > 1     ? (level == sum ? 1.0f : 0.0f)
                                  : m.levels > 1 ? m.level[level]
                                                 : 1.0f;
  const bool several = m.levels > 1 && m.sums == 1;
  const std::span<const float> levels(m.level, static_cast<size_t>(m.levels));
  unit_tables_ =
      make_unit_tables(1, [&](int, int level, bool negative) { return signed_value(level + 1, negative); });
  if (kernels_.integers != nullptr) {
    m.integer_unit = several ? integer_unit(levels) : 1.0f;
    integer_tables_ = make_unit_tables(m.sums, [&](int sum, int level, bool negative) {
      return signed_value(static_cast<int>(std::lrint(m.level_worth[sum][level] / m.integer_unit)), negative);
    });
  }
  if (kernels_.bfloat16 != nullptr) {
    m.bfloat16_unit = several ? bfloat16_unit(levels) : 1.0f;
    bfloat16_tables_ = make_unit_tables(m.sums, [&](int sum, int level, bool negative) {
      const float positive = m.level_worth[sum][level] / m.bfloat16_unit;
      return float_to_bfloat16(negative ? -positive : positive);
    });
  }
}

void CpuMatrix::store_codes(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  MatrixView& m = view_;
  const int64_t groups = kChunkColumns / m.group, words = groups * m.code_bits / 16;
  m.chunk_bytes = m.form == CodeForm::kBytes    ? groups * (kTileRows + (m.signs ? kTileRows / 8 : 0))
                  : m.form == CodeForm::kHalves ? groups * kTileRows * 3 / 2
                                                : words * 2 * kTileRows;
  // Byte tables fill eight registers: once loaded, they should serve several tiles.
  m.strip_tiles = m.form == CodeForm::kBytes || m.form == CodeForm::kHalves ? 4 : 1;
  codes_.assign(static_cast<size_t>(m.chunks * m.tiles * m.chunk_bytes), 0);

  std::vector<uint16_t> halves;
  if (m.form == CodeForm::kHalves) halves = halves_of_codes(layout);
  std::optional<DigitFields> digits;
  if (digits_) digits.emplace(layout, m.group, m.code_bits);

  const auto store_row = [&](const StripRow& at) {
    if (m.form == CodeForm::kBytes) return store_bytes(matrix, at, m);
    if (m.form == CodeForm::kHalves) return store_halves(matrix, at, halves);
    store_words(matrix, at, m, digits ? &*digits : nullptr);
  };
  // A tile's chunk takes 2 to 30 microseconds: sixteen of them are worth a thread.
  parallel_for(m.chunks * m.tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i / m.tiles, tile = i % m.tiles, first_tile = tile - tile % m.strip_tiles;
      StripRow at = {.row = tile * kTileRows,
                     .chunk = chunk,
                     .in_tile = 0,
                     .tile = tile - first_tile,
                     .tiles = std::min<int64_t>(m.strip_tiles, m.tiles - first_tile),
                     .strip = codes_.data() + (chunk * m.tiles + first_tile) * m.chunk_bytes};
      for (; at.in_tile < kTileRows && at.row < m.rows; ++at.in_tile, ++at.row) store_row(at);
    }
  });
}

void CpuMatrix::prepare_scales(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  MatrixView& m = view_;
  const int64_t rows = m.tiles * kTileRows, blocks = layout.column_blocks();
  m.slots = layout.scale_slots();
  const auto half = [](std::span<const std::byte> plane, int64_t index) {
    uint16_t bits;
    std::memcpy(&bits, plane.data() + 2 * index, sizeof bits);
    return bits;
  };
  if (layout.scale_bits == 16) {
    half_scales_.resize(static_cast<size_t>(blocks * m.slots * rows));
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t slot = 0; slot < m.slots; ++slot)
        for (int64_t row = 0; row < m.rows; ++row)
          half_scales_[(block * m.slots + slot) * rows + row] =
              half(matrix.plane(Plane::kScales), (row * blocks + block) * m.slots + slot);
    m.half_scales = half_scales_.data();
    return;
  }
  scale_codes_.resize(static_cast<size_t>(blocks * rows));
  row_scales_.resize(static_cast<size_t>(rows));
  for (int64_t row = 0; row < m.rows; ++row) {
    const std::byte* stream = matrix.plane(Plane::kScaleCodes).data() + row * layout.scale_code_row_bytes();
    for (int64_t block = 0; block < blocks; ++block)
      scale_codes_[block * rows + row] =
          static_cast<uint8_t>(read_bits(stream, block * layout.scale_bits, layout.scale_bits));
    row_scales_[row] = half_to_float(half(matrix.plane(Plane::kRowScales), row));
  }
  m.scale_codes = scale_codes_.data();
  m.scale_bits = layout.scale_bits;
  m.row_scales = row_scales_.data();
  for (int code = 0; code < 1 << layout.scale_bits; ++code)
    m.factors[code] = scale_code_factors(layout.scale_bits)[code];
  for (int slot = 0; slot < m.slots; ++slot)
    m.level[slot] = half_to_float(half(matrix.plane(Plane::kLevels), slot));
}

void CpuMatrix::prepare_columns(const StructuredBinaryMatrix& matrix) {
  MatrixView& m = view_;
  m.salient = std::ssize(matrix.salient_columns());
  m.outliers = std::ssize(matrix.outlier_columns());
  salient_columns_.assign(matrix.salient_columns().begin(), matrix.salient_columns().end());
  outlier_columns_.assign(matrix.outlier_columns().begin(), matrix.outlier_columns().end());

  const int64_t sign_bytes = ceil_div(m.rows, 8), tile_sign_bytes = m.tiles * kTileRows / 8;
  salient_signs_.resize(static_cast<size_t>(m.salient * tile_sign_bytes));
  for (int64_t i = 0; i < m.salient; ++i)
    std::memcpy(&salient_signs_[i * tile_sign_bytes],
                matrix.plane(Plane::kSalientSigns).data() + i * sign_bytes, static_cast<size_t>(sign_bytes));
  outlier_values_.resize(static_cast<size_t>(m.outliers * m.tiles * kTileRows));
  for (int64_t i = 0; i < m.outliers; ++i)
    std::memcpy(&outlier_values_[i * m.tiles * kTileRows],
                matrix.plane(Plane::kOutlierValues).data() + i * m.rows * 2, static_cast<size_t>(m.rows * 2));
  m.salient_columns = data_or_null(salient_columns_);
  if (m.form != CodeForm::kPlane) prepare_salient_symbols(matrix);
  m.outlier_columns = data_or_null(outlier_columns_);
  m.salient_signs = data_or_null(salient_signs_);
  m.outlier_values = data_or_null(outlier_values_);
}

/// The kept rows and first signs of salient columns, which lookups leave out.
void CpuMatrix::prepare_salient_symbols(const StructuredBinaryMatrix& matrix) {
  MatrixView& m = view_;
  const Layout& layout = matrix.layout();
  salient_kept_.assign(salient_signs_.size(), 0);
  salient_first_signs_.assign(salient_signs_.size(), 0);
  parallel_for(m.salient, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = salient_columns_[i] / layout.nm.group;
      const auto position = static_cast<uint8_t>(salient_columns_[i] % layout.nm.group);
      for (int64_t row = 0; row < m.rows; ++row) {
        const GroupSymbols symbols = decode_group(layout.nm, layout.levels, matrix.code(row, group));
        for (int k = 0; k < layout.nm.keep; ++k) {
          if (symbols.position[k] != position) continue;
          const int64_t byte = i * m.tiles * 8 + row / 8;
          salient_kept_[byte] |= static_cast<uint8_t>(1 << row % 8);
          salient_first_signs_[byte] |= static_cast<uint8_t>(symbols.sign[k] << row % 8);
        }
      }
    }
  });
  m.salient_kept = data_or_null(salient_kept_);
  m.salient_first_signs = data_or_null(salient_first_signs_);
}

int64_t CpuMatrix::bytes() const {
  const auto total = [](const auto&... v) { return (static_cast<int64_t>(v.size() * sizeof(v[0])) + ...); };
  return rows_.bytes() + total(codes_, expand_, magnitudes_, terms_, unit_tables_, integer_tables_,
                               bfloat16_tables_, half_base_, half_scales_, scale_codes_, row_scales_,
                               salient_columns_, salient_signs_, salient_kept_, salient_first_signs_,
                               outlier_columns_, outlier_values_);
}

}  // namespace stbllm::cpu
