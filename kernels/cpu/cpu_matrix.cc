#include "cpu_matrix.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "stbllm/base/bits.h"

namespace stbllm::cpu {
namespace {

uint64_t power(uint64_t base, int exponent) {
  uint64_t result = 1;
  while (exponent-- > 0) result *= base;
  return result;
}

Divisor divisor(uint64_t value) { return {value, ~uint64_t{0} / value}; }

// How a lookup form reads the codes.
struct Coding {
  CodeForm form = CodeForm::kPlane;
  NmPattern nm;
  int code_bits = 0;
  bool signs = false;
  bool digits = false;
  int entries = 0;
  int terms = 0;
};

constexpr int entries_of_words(int code_bits) { return code_bits <= 5 ? 32 : 1 << code_bits; }

// Lookups of the codes as they are, where their tables fit registers.
Coding choose_lookups_of_codes(const Layout& layout) {
  Coding coding = {.nm = layout.nm, .code_bits = layout.code_bits(), .terms = layout.nm.keep};
  if (layout.levels == 1 && layout.nm.keep == layout.nm.group) {
    // Dense binary groups of 8 and 16 are groups of 4 written one after the other.
    coding.nm = {4, 4};
    coding.code_bits = coding.terms = 4;
  }
  if (coding.code_bits <= 7) {
    coding.form = CodeForm::kWords;
    coding.entries = entries_of_words(coding.code_bits);
    if (kChunkColumns / coding.nm.group % 16 != 0) coding.form = CodeForm::kPlane;
  } else if (coding.code_bits <= 9) {
    coding.form = CodeForm::kBytes;
    coding.signs = coding.code_bits == 9;
    coding.entries = 256;
  } else if (coding.nm.group == 8 && coding.nm.keep >= 4 && layout.levels == 1) {
    coding.form = CodeForm::kHalves;
    coding.entries = 256;
    coding.terms = 4;
  }
  if (coding.nm.group * layout.levels > kNoSource) coding.form = CodeForm::kPlane;
  return coding;
}

// Lookups for all other codes: the symbols of four columns, with levels of two, are digits of a number in
// base 1 + 2 levels: 0 if pruned, else 1 + 2 level + sign. Costs 1.75, 2.5 or 3 bits a weight for 1, 2 or 3
// levels.
Coding choose_lookups_of_digits(const Layout& layout) {
  const int columns = layout.levels == 1 ? 4 : 2;
  const int bits = bits_for(power(1 + 2 * static_cast<uint64_t>(layout.levels), columns));
  return {.form = CodeForm::kWords,
          .nm = {columns, columns},
          .code_bits = bits,
          .digits = true,
          .entries = entries_of_words(bits),
          .terms = columns};
}

// The same in tables of 16 entries: two columns with one level, one column with more. Costs 2 or 4 bits a
// weight.
Coding choose_nibbles(const Layout& layout) {
  const int columns = layout.levels == 1 ? 2 : 1;
  return {.form = CodeForm::kNibbles,
          .nm = {columns, columns},
          .code_bits = 4,
          .digits = true,
          .entries = 16,
          .terms = columns};
}

Coding choose_coding(const Layout& layout, int64_t chunk_columns, const Kernels& kernels) {
  const Coding plane = {.nm = layout.nm, .code_bits = layout.code_bits()};
  // One table per group gives one sum per row and chunk, so there must be one scale.
  if (layout.salient > 0 || (layout.levels > 1 && layout.scale_bits == 16) || chunk_columns != kChunkColumns)
    return plane;
  Coding coding = choose_lookups_of_codes(layout);
  if (coding.form == CodeForm::kPlane) coding = choose_lookups_of_digits(layout);
  if (!kernels.can_look_up(coding.form, coding.entries)) coding = choose_nibbles(layout);
  return kernels.can_look_up(coding.form, coding.entries) ? coding : plane;
}

// The widest chunk of at most 128 columns that divides a column block into whole groups.
int64_t choose_chunk_columns(const Layout& layout) {
  int64_t columns = std::min<int64_t>(layout.column_block, kChunkColumns / layout.nm.group * layout.nm.group);
  while (layout.column_block % columns != 0) columns -= layout.nm.group;
  return columns;
}

int source_of(NmPattern nm, int level, int column, bool negative) {
  return level * nm.group + column + (negative ? kNegative : 0);
}

// --- halves of a group of eight ---

// The states of four columns with one level, those with fewer kept first: 1, 8, 24, 32, 16 of them.
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

// --- signed codes ---

// A code whose top sign is set stands for the negative of the code with all signs flipped. Without that bit:
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

  const Coding coding = choose_coding(layout, m.chunk_columns, kernels);
  m.form = coding.form;
  m.keep = coding.nm.keep;
  m.group = coding.nm.group;
  m.code_bits = coding.code_bits;
  m.file_keep = layout.nm.keep;
  m.file_group = layout.nm.group;
  m.signs = coding.signs;
  m.entries = coding.entries;
  m.table_bytes = 2 * coding.entries;
  m.term_count = coding.terms;
  digits_ = coding.digits;

  if (m.form == CodeForm::kPlane)
    prepare_plane(matrix);
  else
    prepare_lookups(matrix);
  prepare_scales(matrix);
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
  m.chunks_per_block = m.levels = m.slots = 1;
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
  make_unit_tables();
  store_codes(matrix);
  view_.codes = codes_.data();
  view_.terms = terms_.data();
  view_.unit_tables = unit_tables_.data();
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

/// The table of a group whose column c has activation 1 and the others 0, for every c.
void CpuMatrix::make_unit_tables() {
  const MatrixView& m = view_;
  // Tables of byte shuffles keep the low and the high bytes of so many entries apart.
  const int apart = std::min(m.entries, 128);
  const auto store_entry = [&](uint8_t* table, int entry, int value) {
    if (m.form == CodeForm::kWords) {
      const auto word = static_cast<int16_t>(value);
      std::memcpy(table + 2 * entry, &word, sizeof word);
    } else {
      uint8_t* low = table + entry / apart * 2 * apart + entry % apart;
      low[0] = static_cast<uint8_t>(value);
      low[apart] = static_cast<uint8_t>(value >> 8);
    }
  };
  unit_tables_.resize(static_cast<size_t>(m.group * m.table_bytes));
  for (int column = 0; column < m.group; ++column)
    for (int entry = 0; entry < m.entries; ++entry) {
      int value = 0;
      for (int k = 0; k < m.term_count; ++k) {
        const int source = terms_[k * m.entries + entry], positive = source % kNegative;
        if (positive != kNoSource && positive % m.group == column)
          value += source < kNegative ? positive / m.group + 1 : -(positive / m.group + 1);
      }
      store_entry(&unit_tables_[column * m.table_bytes], entry, value);
    }
}

void CpuMatrix::store_codes(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  MatrixView& m = view_;
  const NmPattern nm = {m.keep, m.group};
  const int64_t groups = kChunkColumns / m.group, present_groups = layout.groups();
  const int words = static_cast<int>(groups * m.code_bits / 16);
  m.chunk_bytes = m.form == CodeForm::kBytes    ? groups * (kTileRows + (m.signs ? kTileRows / 8 : 0))
                  : m.form == CodeForm::kHalves ? groups * kTileRows * 3 / 2
                                                : words * 2 * kTileRows;
  // Byte tables fill eight registers: once loaded, they should serve several tiles.
  m.strip_tiles = m.form == CodeForm::kBytes || m.form == CodeForm::kHalves ? 4 : 1;
  codes_.assign(static_cast<size_t>(m.chunks * m.tiles * m.chunk_bytes), 0);

  std::vector<uint16_t> half_codes;  // kHalves: left | right << 7, by stored code
  if (m.form == CodeForm::kHalves) {
    half_codes.resize(layout.code_states());
    for (uint64_t code = 0; code < half_codes.size(); ++code) {
      const GroupSymbols group = decode_group(nm, 1, code);
      const Half left = half_of(group, nm.keep, 0), right = half_of(group, nm.keep, 4);
      half_codes[code] = static_cast<uint16_t>((kHalfOffset[left.kept] + left.index) | right.index << 7);
    }
  }

  // Digit forms: the fields of a stored group, one after the other.
  const NmPattern stored = layout.nm;
  const int fields = stored.group / m.group, digit_bits = fields * m.code_bits;
  const auto digit_fields = [&](uint64_t code) {
    const GroupSymbols group = decode_group(stored, m.levels, code);
    std::array<uint64_t, 16> symbol{};
    for (int k = 0; k < stored.keep; ++k)
      symbol[group.position[k]] = 1 + 2 * uint64_t{group.level[k]} + group.sign[k];
    uint64_t packed = 0;
    for (int field = fields - 1; field >= 0; --field) {
      uint64_t number = 0;
      for (int column = m.group - 1; column >= 0; --column)
        number = number * (1 + 2 * static_cast<uint64_t>(m.levels)) + symbol[field * m.group + column];
      packed = packed << m.code_bits | number;
    }
    return packed;
  };
  constexpr uint64_t kMaxTable = 1 << 18;
  std::vector<uint64_t> digit_table(digits_ && layout.code_states() <= kMaxTable ? layout.code_states() : 0);
#pragma omp parallel for schedule(static)
  for (int64_t code = 0; code < std::ssize(digit_table); ++code)
    digit_table[code] = digit_fields(static_cast<uint64_t>(code));

  const auto plane = matrix.plane(Plane::kCodes);
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t chunk = 0; chunk < m.chunks; ++chunk)
    for (int64_t tile = 0; tile < m.tiles; ++tile) {
      const int64_t in_strip = tile % m.strip_tiles, first_tile = tile - in_strip;
      const int64_t strip = std::min<int64_t>(m.strip_tiles, m.tiles - first_tile);
      uint8_t* out = codes_.data() + (chunk * m.tiles + first_tile) * m.chunk_bytes;
      const int rows = static_cast<int>(std::min<int64_t>(kTileRows, m.rows - tile * kTileRows));
      for (int r = 0; r < rows; ++r) {
        const int64_t row = tile * kTileRows + r;
        const int lane = r / 32 * 32 + lane_of_row(r);
        if (m.form == CodeForm::kWords || m.form == CodeForm::kNibbles) {
          std::array<uint16_t, 32> line{};  // the row's bits
          if (digits_) {
            const int64_t row_groups = kChunkColumns / stored.group, first = chunk * row_groups;
            for (int64_t g = 0; g < std::min(row_groups, present_groups - first); ++g) {
              const uint64_t code = matrix.code(row, first + g);
              write_bits(reinterpret_cast<std::byte*>(line.data()), g * digit_bits, digit_bits,
                         digit_table.empty() ? digit_fields(code) : digit_table[code]);
            }
          } else {
            const int64_t first = chunk * words * 2, row_bytes = layout.code_row_bytes();
            std::memcpy(line.data(), plane.data() + row * row_bytes + first,
                        static_cast<size_t>(std::min<int64_t>(words * 2, row_bytes - first)));
          }
          if (m.form == CodeForm::kWords)
            for (int w = 0; w < words; ++w) std::memcpy(out + (w * kTileRows + lane) * 2, &line[w], 2);
          else
            for (int b = 0; b < 2 * words; ++b)
              std::memcpy(out + b * kTileRows + r, reinterpret_cast<const uint8_t*>(line.data()) + b, 1);
          continue;
        }
        const int64_t first = chunk * groups, count = std::min(groups, present_groups - first);
        const int byte = byte_of_row(r);
        for (int64_t g = 0; g < count; ++g) {
          const uint64_t code = matrix.code(row, first + g);
          if (m.form == CodeForm::kHalves) {
            const unsigned halves = half_codes[code], right = halves >> 7;
            const auto part = [&](int i) -> uint8_t& {
              return out[((g / 2 * 3 + i) * strip + in_strip) * kTileRows + byte];
            };
            part(static_cast<int>(g % 2)) = static_cast<uint8_t>((halves & 127) | right >> 4 << 7);
            part(2) |= static_cast<uint8_t>((right & 15) << 4 * (g % 2));
            continue;
          }
          const int64_t at = (g * strip + in_strip) * kTileRows;
          out[at + byte] = static_cast<uint8_t>(m.signs ? unsigned_code(code, nm.keep) : code);
          if (m.signs && (code >> (nm.keep - 1) & 1))
            out[groups * strip * kTileRows + (at + lane) / 8] |= static_cast<uint8_t>(1 << lane % 8);
        }
      }
    }
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
    m.factors[code] = scale_code_factor(layout.scale_bits, code);
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
  m.outlier_columns = data_or_null(outlier_columns_);
  m.salient_signs = data_or_null(salient_signs_);
  m.outlier_values = data_or_null(outlier_values_);
}

int64_t CpuMatrix::bytes() const {
  const auto total = [](const auto&... v) { return (static_cast<int64_t>(v.size() * sizeof(v[0])) + ...); };
  return rows_.bytes() + total(codes_, expand_, magnitudes_, terms_, unit_tables_, half_base_, half_scales_,
                               scale_codes_, row_scales_, salient_columns_, salient_signs_, outlier_columns_,
                               outlier_values_);
}

}  // namespace stbllm::cpu
