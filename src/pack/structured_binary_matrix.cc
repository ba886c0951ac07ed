#include "stbllm/pack/structured_binary_matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parallel.h"
#include "stbllm/base/scale_codes.h"

namespace stbllm {
namespace {

static_assert(std::endian::native == std::endian::little, "planes are little-endian and read in place");

// Dimensions up to 2^30 keep every byte count below 2^63.
constexpr int64_t kMaxDimension = int64_t{1} << 30;

// C(n, k), the digits of the combinatorial number system.
constexpr auto kBinomial = [] {
  std::array<std::array<int64_t, 17>, 17> table{};
  for (int n = 0; n <= 16; ++n)
    for (int k = 0; k <= 16; ++k) table[n][k] = binomial(n, k);
  return table;
}();

constexpr uint64_t power(uint64_t base, int exponent) {
  uint64_t result = 1;
  for (int i = 0; i < exponent; ++i) result *= base;
  return result;
}

uint64_t count_states(NmPattern nm, int levels) {
  return static_cast<uint64_t>(kBinomial[nm.group][nm.keep]) *
         power(2 * static_cast<uint64_t>(levels), nm.keep);
}

uint16_t load_half_bits(std::span<const std::byte> plane, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, plane.data() + 2 * index, sizeof bits);
  return bits;
}

float load_half(std::span<const std::byte> plane, int64_t index) {
  return half_to_float(load_half_bits(plane, index));
}

bool is_scale(uint16_t half_bits) { return half_bits < 0x7c00; }  // finite, no sign
bool is_finite(uint16_t half_bits) { return (half_bits & 0x7fff) < 0x7c00; }

// A decode table has a row of M symbols for each code: 0 where nothing is kept, else 1 + 2 * level + sign.
// Matrices of the same (nm, levels) share it. It exists for up to 2^16 codes, which are all combinations of
// practical use except 4:8 with three levels.
constexpr uint64_t kMaxTableStates = 1 << 16;

void expand_group(NmPattern nm, int levels, uint64_t code, uint8_t* symbols) {
  std::fill_n(symbols, nm.group, uint8_t{0});
  const GroupSymbols group = decode_group(nm, levels, code);
  for (int k = 0; k < nm.keep; ++k)
    symbols[group.position[k]] = static_cast<uint8_t>(1 + 2 * group.level[k] + group.sign[k]);
}

const uint8_t* decode_table(NmPattern nm, int levels) {
  const uint64_t states = count_states(nm, levels);
  if (states > kMaxTableStates) return nullptr;
  static std::mutex mutex;
  static std::map<std::tuple<NmPattern, int>, std::vector<uint8_t>> tables;
  const std::lock_guard lock(mutex);
  std::vector<uint8_t>& table = tables[{nm, levels}];
  if (table.empty()) {
    table.resize(states * nm.group);
    for (uint64_t code = 0; code < states; ++code) expand_group(nm, levels, code, &table[code * nm.group]);
  }
  return table.data();
}

// What read_bits() returns, with one load where eight bytes are left.
uint64_t read_code(std::span<const std::byte> plane, int64_t offset, int width) {
  const int64_t first = offset >> 3;
  if (first + 8 > std::ssize(plane)) return read_bits(plane.data(), offset, width);
  uint64_t word;
  std::memcpy(&word, plane.data() + first, sizeof word);
  return word >> (offset & 7) & ((uint64_t{1} << width) - 1);
}

std::span<const int32_t> as_columns(std::span<const std::byte> plane) {
  return {reinterpret_cast<const int32_t*>(plane.data()), plane.size() / sizeof(int32_t)};
}

// The index of `col` in an ascending list, or -1.
int64_t find_column(std::span<const int32_t> columns, int64_t col) {
  const auto at = std::ranges::lower_bound(columns, col);
  return at != columns.end() && *at == col ? at - columns.begin() : -1;
}

void check_columns(std::span<const std::byte> plane, int64_t cols, std::string_view name,
                   std::string_view what) {
  if (!plane.empty() && reinterpret_cast<uintptr_t>(plane.data()) % alignof(int32_t) != 0)
    fail(ErrorCode::kCorrupt, "{}: plane '{}' does not start at a multiple of 4 bytes", what, name);
  int64_t previous = -1;
  for (const int32_t col : as_columns(plane)) {
    if (col <= previous || col >= cols)
      fail(ErrorCode::kCorrupt, "{}: plane '{}': expected ascending columns below {}, found {} after {}",
           what, name, cols, col, previous);
    previous = col;
  }
}

}  // namespace

int64_t Layout::groups() const { return ceil_div(cols, nm.group); }
uint64_t Layout::code_states() const { return count_states(nm, levels); }
int Layout::code_bits() const { return bits_for(code_states()); }
int64_t Layout::code_row_bytes() const { return ceil_div(groups() * code_bits(), 8); }
int64_t Layout::column_blocks() const { return ceil_div(cols, column_block); }
int64_t Layout::scale_code_row_bytes() const { return ceil_div(column_blocks() * scale_bits, 8); }

void Layout::validate(std::string_view what) const {
  const auto require = [&](bool ok, std::string_view expected) {
    if (!ok) fail(ErrorCode::kCorrupt, "{}: layout out of range: expected {}", what, expected);
  };
  require(rows >= 1 && rows <= kMaxDimension, fmt::format("rows in 1..2^30, found {}", rows));
  require(cols >= 1 && cols <= kMaxDimension, fmt::format("cols in 1..2^30, found {}", cols));
  require(nm.group == 4 || nm.group == 8 || nm.group == 16,
          fmt::format("groups of 4, 8 or 16, found {}", nm.group));
  require(nm.keep >= 1 && nm.keep <= nm.group,
          fmt::format("1..{} kept of {}, found {}", nm.group, nm.group, nm.keep));
  require(levels >= 1 && levels <= 3, fmt::format("levels in 1..3, found {}", levels));
  require(
      column_block >= nm.group && column_block <= kMaxDimension && column_block % nm.group == 0,
      fmt::format("a column block that is a multiple of {} up to 2^30, found {}", nm.group, column_block));
  require(scale_bits == 16 || (scale_bits >= 4 && scale_bits <= 6),
          fmt::format("scale bits 4, 5, 6 or 16, found {}", scale_bits));
  require(salient >= 0 && salient <= cols && outliers >= 0 && outliers <= cols - salient,
          fmt::format("salient and outlier columns within {}, found {} and {}", cols, salient, outliers));
}

std::string_view plane_name(Plane plane) {
  switch (plane) {
    case Plane::kCodes:
      return "codes";
    case Plane::kScales:
      return "scales";
    case Plane::kScaleCodes:
      return "scale_codes";
    case Plane::kRowScales:
      return "row_scales";
    case Plane::kLevels:
      return "levels";
    case Plane::kSalientColumns:
      return "salient_columns";
    case Plane::kSalientSigns:
      return "salient_signs";
    case Plane::kOutlierColumns:
      return "outlier_columns";
    case Plane::kOutlierValues:
      return "outlier_values";
  }
  return {};
}

std::string_view plane_dtype(Plane plane) {
  switch (plane) {
    case Plane::kCodes:
    case Plane::kScaleCodes:
    case Plane::kSalientSigns:
      return "U8";
    case Plane::kScales:
    case Plane::kRowScales:
    case Plane::kLevels:
    case Plane::kOutlierValues:
      return "F16";
    case Plane::kSalientColumns:
    case Plane::kOutlierColumns:
      return "I32";
  }
  return {};
}

std::vector<int64_t> plane_shape(const Layout& layout, Plane plane) {
  const bool coded = layout.scale_bits < 16;
  const int64_t slots = layout.scale_slots();
  switch (plane) {
    case Plane::kCodes:
      return {layout.rows, layout.code_row_bytes()};
    case Plane::kScales:
      return {coded ? 0 : layout.rows, layout.column_blocks(), slots};
    case Plane::kScaleCodes:
      return {coded ? layout.rows : 0, layout.scale_code_row_bytes()};
    case Plane::kRowScales:
      return {coded ? layout.rows : 0};
    case Plane::kLevels:
      return {coded ? slots : 0};
    case Plane::kSalientColumns:
      return {layout.salient};
    case Plane::kSalientSigns:
      return {layout.salient, ceil_div(layout.rows, 8)};
    case Plane::kOutlierColumns:
      return {layout.outliers};
    case Plane::kOutlierValues:
      return {layout.outliers, layout.rows};
  }
  return {};
}

int64_t plane_bytes(const Layout& layout, Plane plane) {
  const std::string_view dtype = plane_dtype(plane);
  int64_t bytes = dtype == "I32" ? 4 : dtype == "F16" ? 2 : 1;
  for (const int64_t extent : plane_shape(layout, plane)) bytes *= extent;
  return bytes;
}

int64_t layout_bytes(const Layout& layout) {
  int64_t bytes = 0;
  for (int p = 0; p < kPlaneCount; ++p) bytes += plane_bytes(layout, static_cast<Plane>(p));
  return bytes;
}

uint64_t encode_group(NmPattern nm, int levels, const GroupSymbols& symbols) {
  uint64_t rank = 0, level_digits = 0, signs = 0, weight = 1;
  for (int k = 0; k < nm.keep; ++k) {
    const int position = symbols.position[k], level = symbols.level[k], sign = symbols.sign[k];
    STBLLM_CHECK(
        position < nm.group && (k == 0 || position > symbols.position[k - 1]) && level < levels && sign <= 1,
        "kept weight {} of a {} group with {} levels: position {}, level {}, sign {}", k, nm.str(), levels,
        position, level, sign);
    rank += static_cast<uint64_t>(kBinomial[position][k + 1]);
    level_digits += static_cast<uint64_t>(level) * weight;
    signs |= static_cast<uint64_t>(sign) << k;
    weight *= static_cast<uint64_t>(levels);
  }
  return (rank * weight + level_digits) << nm.keep | signs;
}

GroupSymbols decode_group(NmPattern nm, int levels, uint64_t code) {
  GroupSymbols symbols;
  const uint64_t weight = power(static_cast<uint64_t>(levels), nm.keep);
  uint64_t level_digits = (code >> nm.keep) % weight;
  for (int k = 0; k < nm.keep; ++k) {
    symbols.sign[k] = code >> k & 1;
    symbols.level[k] = static_cast<uint8_t>(level_digits % static_cast<uint64_t>(levels));
    level_digits /= static_cast<uint64_t>(levels);
  }
  // The last position is the largest p with C(p, N) <= rank, and so on downwards.
  auto rank = static_cast<int64_t>((code >> nm.keep) / weight);
  for (int k = nm.keep - 1, position = nm.group - 1; k >= 0; --k, --position) {
    while (kBinomial[position][k + 1] > rank) --position;
    rank -= kBinomial[position][k + 1];
    symbols.position[k] = static_cast<uint8_t>(position);
  }
  return symbols;
}

StructuredBinaryMatrix::StructuredBinaryMatrix(const Layout& layout, Planes planes,
                                               std::shared_ptr<const void> owner, std::string_view what)
    : layout_(layout), planes_(planes), owner_(std::move(owner)) {
  layout_.validate(what);
  for (int i = 0; i < kPlaneCount; ++i) {
    const auto plane = static_cast<Plane>(i);
    const int64_t expected = plane_bytes(layout_, plane);
    if (std::ssize(planes_[i]) != expected)
      fail(ErrorCode::kCorrupt, "{}: plane '{}': expected {} bytes, found {}", what, plane_name(plane),
           expected, planes_[i].size());
  }
  code_bits_ = layout_.code_bits();
  code_row_bytes_ = layout_.code_row_bytes();
  symbols_ = decode_table(layout_.nm, layout_.levels);

  check_columns(plane(Plane::kSalientColumns), layout_.cols, plane_name(Plane::kSalientColumns), what);
  check_columns(plane(Plane::kOutlierColumns), layout_.cols, plane_name(Plane::kOutlierColumns), what);
  for (const int32_t col : outlier_columns())
    if (find_column(salient_columns(), col) >= 0)
      fail(ErrorCode::kCorrupt, "{}: column {} is both salient and an outlier", what, col);

  const int64_t sign_row_bits = 8 * ceil_div(layout_.rows, 8);
  for (int64_t i = 0; i < layout_.salient; ++i)
    if (read_bits(plane(Plane::kSalientSigns).data(), i * sign_row_bits + layout_.rows,
                  static_cast<int>(sign_row_bits - layout_.rows)) != 0)
      fail(ErrorCode::kCorrupt, "{}: plane 'salient_signs': column {} of {}: unused bits are not 0", what, i,
           layout_.salient);
  for (int64_t i = 0; i < layout_.outliers * layout_.rows; ++i)
    if (!is_finite(load_half_bits(plane(Plane::kOutlierValues), i)))
      fail(ErrorCode::kCorrupt, "{}: plane 'outlier_values': element {} is not finite", what, i);
  for (int64_t slot = 0; slot < std::ssize(plane(Plane::kLevels)) / 2; ++slot)
    if (!is_scale(load_half_bits(plane(Plane::kLevels), slot)))
      fail(ErrorCode::kCorrupt, "{}: plane 'levels': slot {} is not finite or is negative", what, slot);

  // A thread is worth its start from about 65536 codes on.
  parallel_for(layout_.rows, ceil_div(1 << 16, layout_.groups()), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      if (const std::string fault = row_fault(row); !fault.empty())
        fail(ErrorCode::kCorrupt, "{}: row {}: {}", what, row, fault);
  });
}

std::string StructuredBinaryMatrix::row_fault(int64_t row) const {
  const int64_t groups = layout_.groups(), blocks = layout_.column_blocks();
  const int keep = layout_.nm.keep, group_size = layout_.nm.group;

  const uint64_t states = layout_.code_states();
  if (!std::has_single_bit(states))  // otherwise every code is one of them
    for (int64_t group = 0; group < groups; ++group)
      if (code(row, group) >= states)
        return fmt::format("group {}: expected a code below {}, found {}", group, states, code(row, group));
  const int64_t used = groups * code_bits_;
  if (read_bits(plane(Plane::kCodes).data() + row * code_row_bytes_, used,
                static_cast<int>(8 * code_row_bytes_ - used)))
    return "unused bits after the last code are not 0";

  // A virtual column may be kept only in place of a real one that does not exist.
  if (const auto real = static_cast<int>(layout_.cols % group_size); real != 0) {
    const GroupSymbols last = decode_group(layout_.nm, layout_.levels, code(row, groups - 1));
    const int kept = static_cast<int>(std::count_if(last.position.begin(), last.position.begin() + keep,
                                                    [&](uint8_t position) { return position < real; }));
    if (kept != std::min(real, keep))
      return fmt::format("last group: expected {} kept among its {} columns, found {}", std::min(real, keep),
                         real, kept);
  }

  if (layout_.levels > 1)
    for (const int32_t col : salient_columns()) {
      const GroupSymbols symbols = decode_group(layout_.nm, layout_.levels, code(row, col / group_size));
      for (int k = 0; k < keep; ++k)
        if (symbols.position[k] == col % group_size && symbols.level[k] != 0)
          return fmt::format("salient column {}: expected level 0, found {}", col, symbols.level[k]);
    }

  if (layout_.scale_bits == 16) {
    const int64_t count = blocks * layout_.scale_slots();
    for (int64_t i = row * count; i < (row + 1) * count; ++i)
      if (!is_scale(load_half_bits(plane(Plane::kScales), i)))
        return fmt::format("column block {}: a scale is not finite or is negative",
                           i % count / layout_.scale_slots());
  } else {
    if (!is_scale(load_half_bits(plane(Plane::kRowScales), row)))
      return "the row scale is not finite or is negative";
    const int64_t bytes = layout_.scale_code_row_bytes(), scale_bits_used = blocks * layout_.scale_bits;
    if (read_bits(plane(Plane::kScaleCodes).data() + row * bytes, scale_bits_used,
                  static_cast<int>(8 * bytes - scale_bits_used)))
      return "unused bits after the last scale code are not 0";
  }
  return {};
}

uint64_t StructuredBinaryMatrix::code(int64_t row, int64_t group) const {
  return read_code(plane(Plane::kCodes), 8 * row * code_row_bytes_ + group * code_bits_, code_bits_);
}

float StructuredBinaryMatrix::scale(int64_t row, int64_t column_block, int slot) const {
  if (layout_.scale_bits == 16)
    return load_half(plane(Plane::kScales),
                     (row * layout_.column_blocks() + column_block) * layout_.scale_slots() + slot);
  const auto scale_code =
      static_cast<int>(read_bits(plane(Plane::kScaleCodes).data() + row * layout_.scale_code_row_bytes(),
                                 column_block * layout_.scale_bits, layout_.scale_bits));
  return load_half(plane(Plane::kRowScales), row) * scale_code_factors(layout_.scale_bits)[scale_code] *
         load_half(plane(Plane::kLevels), slot);
}

std::span<const int32_t> StructuredBinaryMatrix::salient_columns() const {
  return as_columns(plane(Plane::kSalientColumns));
}

std::span<const int32_t> StructuredBinaryMatrix::outlier_columns() const {
  return as_columns(plane(Plane::kOutlierColumns));
}

bool StructuredBinaryMatrix::salient_sign(int64_t index, int64_t row) const {
  return read_bits(plane(Plane::kSalientSigns).data() + index * ceil_div(layout_.rows, 8), row, 1) != 0;
}

float StructuredBinaryMatrix::outlier_value(int64_t index, int64_t row) const {
  return load_half(plane(Plane::kOutlierValues), index * layout_.rows + row);
}

float StructuredBinaryMatrix::at(int64_t row, int64_t col) const {
  if (const int64_t outlier = find_column(outlier_columns(), col); outlier >= 0)
    return outlier_value(outlier, row);

  const int group_size = layout_.nm.group;
  const GroupSymbols symbols = decode_group(layout_.nm, layout_.levels, code(row, col / group_size));
  const auto end = symbols.position.begin() + layout_.nm.keep;
  const auto kept = std::find(symbols.position.begin(), end, col % group_size);
  if (kept == end) return 0.0f;
  const auto k = kept - symbols.position.begin();

  const int64_t block = col / layout_.column_block;
  const auto signed_scale = [&](bool negative, int slot) {
    const float value = scale(row, block, slot);
    return negative ? -value : value;
  };
  const int64_t salient = find_column(salient_columns(), col);
  if (salient < 0) return signed_scale(symbols.sign[k], symbols.level[k]);
  return signed_scale(symbols.sign[k], layout_.levels) +
         signed_scale(salient_sign(salient, row), layout_.levels + 1);
}

void StructuredBinaryMatrix::decode_row(int64_t row, float* out) const {
  const int group_size = layout_.nm.group;
  const auto groups_per_block = layout_.column_block / group_size;
  std::array<float, 7> value{};  // by symbol
  std::array<uint8_t, 16> expanded;
  for (int64_t group = 0; group < layout_.groups(); ++group) {
    if (group % groups_per_block == 0)
      for (int level = 0; level < layout_.levels; ++level) {
        value[1 + 2 * level] = scale(row, group / groups_per_block, level);
        value[2 + 2 * level] = -value[1 + 2 * level];
      }
    const uint64_t group_code = code(row, group);
    const uint8_t* symbols = expanded.data();
    if (symbols_ != nullptr)
      symbols = symbols_ + group_code * group_size;
    else
      expand_group(layout_.nm, layout_.levels, group_code, expanded.data());
    const int64_t first = group * group_size;
    const int64_t count = std::min<int64_t>(group_size, layout_.cols - first);
    for (int64_t i = 0; i < count; ++i) out[first + i] = value[symbols[i]];
  }
  // Salient and outlier columns are few; the decode rule itself is fast enough for them.
  for (const int32_t col : salient_columns()) out[col] = at(row, col);
  const auto outliers = outlier_columns();
  for (int64_t i = 0; i < std::ssize(outliers); ++i) out[outliers[i]] = outlier_value(i, row);
}

int64_t StructuredBinaryMatrix::bytes() const {
  int64_t total = 0;
  for (const auto& plane : planes_) total += std::ssize(plane);
  return total;
}

double StructuredBinaryMatrix::stored_bits() const {
  return 8.0 * static_cast<double>(bytes()) /
         (static_cast<double>(layout_.rows) * static_cast<double>(layout_.cols));
}

}  // namespace stbllm
