#include "stbllm/pack/structured_binary_matrix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "support/naive_decoder.h"
#include "support/random_matrix.h"

namespace stbllm {
namespace {

using ::testing::HasSubstr;

constexpr std::array kAllPlanes = {
    Plane::kCodes,        Plane::kScales,         Plane::kScaleCodes,
    Plane::kRowScales,    Plane::kLevels,         Plane::kSalientColumns,
    Plane::kSalientSigns, Plane::kOutlierColumns, Plane::kOutlierValues,
};

test::NaiveDecoder naive_decoder(const StructuredBinaryMatrix& matrix) {
  const Layout& l = matrix.layout();
  std::map<std::string, std::span<const std::byte>> planes;
  for (const Plane plane : kAllPlanes) planes[std::string(plane_name(plane))] = matrix.plane(plane);
  return {
      {l.rows, l.cols, l.nm.keep, l.nm.group, l.levels, l.column_block, l.scale_bits, l.salient, l.outliers},
      planes};
}

// at(), decode_row() and the decoder written from FORMAT.md give the same bits everywhere.
void expect_decoders_agree(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  const test::NaiveDecoder naive = naive_decoder(matrix);
  std::vector<float> row_values(static_cast<size_t>(layout.cols));
  for (int64_t row = 0; row < layout.rows; ++row) {
    matrix.decode_row(row, row_values.data());
    for (int64_t col = 0; col < layout.cols; ++col) {
      const float expected = naive.weight(row, col);
      ASSERT_EQ(std::bit_cast<uint32_t>(matrix.at(row, col)), std::bit_cast<uint32_t>(expected))
          << "at(" << row << ", " << col << ")";
      ASSERT_EQ(std::bit_cast<uint32_t>(row_values[col]), std::bit_cast<uint32_t>(expected))
          << "decode_row(" << row << ")[" << col << "]";
    }
  }
}

std::string describe(const Layout& l) {
  return fmt::format("{}x{} {} levels {} block {} scale bits {} salient {} outliers {}", l.rows, l.cols,
                     l.nm.str(), l.levels, l.column_block, l.scale_bits, l.salient, l.outliers);
}

TEST(GroupCode, DecodeInvertsEncodeForEveryCode) {
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels) {
        const NmPattern nm{keep, group};
        const uint64_t states = Layout{.rows = 1, .cols = group, .nm = nm, .levels = levels}.code_states();
        // Every code up to 2^16 of them, then an odd stride that reaches the last one.
        const uint64_t stride = states <= 1 << 16 ? 1 : states / 20011 | 1;
        for (uint64_t i = 0; i * stride < states; ++i) {
          const uint64_t code = states - 1 - i * stride;
          const GroupSymbols symbols = decode_group(nm, levels, code);
          ASSERT_EQ(encode_group(nm, levels, symbols), code) << nm.str() << " levels " << levels;
        }
      }
}

TEST(GroupCode, FollowsTheColexicographicOrder) {
  // 2:4, two levels: support {1, 3} has rank C(1,1) + C(3,2) = 4; digits 1, 0; signs -, +.
  GroupSymbols symbols;
  symbols.position = {1, 3};
  symbols.level = {1, 0};
  symbols.sign = {1, 0};
  EXPECT_EQ(encode_group({2, 4}, 2, symbols), (4u * 4 + 1) * 4 + 1);
}

TEST(GroupCode, RefusesSymbolsOutOfRange) {
  GroupSymbols symbols;
  symbols.position = {2, 1};  // not ascending
  EXPECT_THROW(encode_group({2, 4}, 1, symbols), std::logic_error);
  symbols.position = {1, 4};  // outside the group
  EXPECT_THROW(encode_group({2, 4}, 1, symbols), std::logic_error);
  symbols.position = {1, 2};
  symbols.level = {0, 1};  // one level only
  EXPECT_THROW(encode_group({2, 4}, 1, symbols), std::logic_error);
}

TEST(Layout, CodeBitsMatchThePublishedTable) {
  const auto bits = [](int keep, int group, int levels) {
    return Layout{.rows = 1, .cols = group, .nm = {keep, group}, .levels = levels}.code_bits();
  };
  EXPECT_EQ(bits(1, 8, 1), 4);
  EXPECT_EQ(bits(1, 4, 1), 3);
  EXPECT_EQ(bits(2, 8, 1), 7);
  EXPECT_EQ(bits(3, 8, 1), 9);
  EXPECT_EQ(bits(2, 4, 1), 5);
  EXPECT_EQ(bits(4, 8, 1), 11);
  EXPECT_EQ(bits(5, 8, 1), 11);
  EXPECT_EQ(bits(6, 8, 1), 11);
  EXPECT_EQ(bits(7, 8, 1), 10);
  EXPECT_EQ(bits(8, 8, 1), 8);
  EXPECT_EQ(bits(2, 4, 2), 7);
  EXPECT_EQ(bits(2, 4, 3), 8);
  EXPECT_EQ(bits(4, 8, 3), 17);
  EXPECT_EQ(bits(14, 16, 3), 44);
}

TEST(StructuredBinaryMatrix, EveryPatternDecodesAsTheSpecificationSays) {
  uint64_t seed = 0;
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels) {
        // 2 column blocks of 3 groups, the last group cut short.
        const Layout layout{.rows = 3,
                            .cols = 5 * group + 1 + keep % (group - 1),
                            .nm = {keep, group},
                            .levels = levels,
                            .column_block = 3 * group};
        SCOPED_TRACE(describe(layout));
        expect_decoders_agree(test::random_matrix(layout, ++seed));
      }
}

TEST(StructuredBinaryMatrix, EveryScaleCodingDecodesWithSalientAndOutlierColumns) {
  uint64_t seed = 100;
  for (const NmPattern nm : {NmPattern{2, 4}, NmPattern{4, 8}, NmPattern{1, 8}, NmPattern{9, 16}})
    for (const int levels : {1, 3})
      for (const int scale_bits : {16, 4, 5, 6})
        for (const int64_t cols : {1, 7, 128, 141})
          for (const auto& [salient, outliers] : {std::pair{0, 0}, {1, 0}, {0, 1}, {3, 4}}) {
            if (salient + outliers > cols) continue;
            const Layout layout{.rows = 9,
                                .cols = cols,
                                .nm = nm,
                                .levels = levels,
                                .scale_bits = scale_bits,
                                .salient = salient,
                                .outliers = outliers};
            SCOPED_TRACE(describe(layout));
            for (const auto content : {test::Content::kReal, test::Content::kExact})
              expect_decoders_agree(test::random_matrix(layout, ++seed, content));
          }
}

TEST(StructuredBinaryMatrix, KeepsExactlyNOfEveryFullGroup) {
  const Layout layout{.rows = 8, .cols = 61, .nm = {3, 8}, .levels = 2};
  const auto matrix = test::random_matrix(layout, 7, test::Content::kExact);  // no zero scales
  for (int64_t row = 0; row < layout.rows; ++row)
    for (int64_t group = 0; group < layout.groups(); ++group) {
      int kept = 0;
      for (int64_t col = 8 * group; col < std::min<int64_t>(layout.cols, 8 * group + 8); ++col)
        kept += matrix.at(row, col) != 0.0f;
      EXPECT_EQ(kept, 3);
    }
}

TEST(StructuredBinaryMatrix, ReadsPlanesAtAnyByteAddress) {
  const Layout layout{.rows = 5, .cols = 40, .nm = {4, 8}, .levels = 3, .scale_bits = 5, .outliers = 2};
  const test::OwnedPlanes planes = test::random_planes(layout, 3);
  const auto reference = planes.matrix(layout);
  std::array<std::vector<std::byte>, kPlaneCount> shifted;
  StructuredBinaryMatrix::Planes views;
  for (const Plane plane : kAllPlanes) {
    const auto i = static_cast<size_t>(plane);
    const size_t shift = plane == Plane::kOutlierColumns ? 4 : 1;  // lists of columns must be aligned
    shifted[i].resize(shift);
    shifted[i].insert(shifted[i].end(), planes.bytes[i].begin(), planes.bytes[i].end());
    views[i] = std::span<const std::byte>(shifted[i]).subspan(shift);
  }
  const StructuredBinaryMatrix matrix(layout, views, nullptr, "shifted");
  for (int64_t row = 0; row < layout.rows; ++row)
    for (int64_t col = 0; col < layout.cols; ++col) EXPECT_EQ(matrix.at(row, col), reference.at(row, col));
}

TEST(StructuredBinaryMatrix, CountsStoredBits) {
  // FORMAT.md: 2:4 codes 5 bits of 4, 5-bit scale codes per 128 columns, fp16 base per row, levels and
  // outliers.
  const Layout layout{.rows = 64, .cols = 512, .nm = {2, 4}, .scale_bits = 5, .outliers = 2};
  const auto matrix = test::random_matrix(layout, 1);
  const int64_t codes = 64 * (128 * 5 / 8), scale_codes = 64 * 3, row_scales = 64 * 2, levels = 2;
  const int64_t outliers = 2 * (4 + 2 * 64);
  EXPECT_EQ(matrix.bytes(), codes + scale_codes + row_scales + levels + outliers);
  EXPECT_DOUBLE_EQ(matrix.stored_bits(), static_cast<double>(matrix.bytes()) * 8 / (64 * 512));
}

struct Damage {
  std::string name;
  Layout layout;
  std::function<void(test::OwnedPlanes&)> apply;
  std::string message;
};

class DamagedMatrix : public ::testing::TestWithParam<Damage> {};

TEST_P(DamagedMatrix, IsRefusedByName) {
  const Damage& damage = GetParam();
  test::OwnedPlanes planes = test::random_planes(damage.layout, 11);
  ASSERT_NO_THROW(planes.matrix(damage.layout));
  damage.apply(planes);
  try {
    planes.matrix(damage.layout);
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCorrupt);
    EXPECT_THAT(error.what(), HasSubstr("random matrix"));
    EXPECT_THAT(error.what(), HasSubstr(damage.message));
  }
}

void set_half(std::vector<std::byte>& plane, int64_t index, uint16_t bits) {
  std::memcpy(plane.data() + 2 * index, &bits, 2);
}

void set_column(std::vector<std::byte>& plane, int64_t index, int32_t column) {
  std::memcpy(plane.data() + 4 * index, &column, 4);
}

// With 2:4 and one level 24 of the 32 codes of 5 bits exist. 10 columns are two full groups and one with two
// real columns, whose codes use 15 of the 16 bits of a row.
constexpr Layout kSmall{.rows = 5, .cols = 10, .nm = {2, 4}};
constexpr Layout kCoded{
    .rows = 5, .cols = 300, .nm = {2, 4}, .levels = 2, .scale_bits = 5, .salient = 3, .outliers = 2};
constexpr auto kNan = uint16_t{0x7e00}, kInfinity = uint16_t{0x7c00}, kMinusOne = uint16_t{0xbc00};

INSTANTIATE_TEST_SUITE_P(
    All, DamagedMatrix,
    ::testing::Values(
        Damage{"PlaneTooShort", kSmall, [](auto& p) { p[Plane::kCodes].pop_back(); },
               "plane 'codes': expected 10 bytes"},
        Damage{"PlaneTooLong", kSmall, [](auto& p) { p[Plane::kScales].resize(99); }, "plane 'scales'"},
        Damage{"PlaneTheLayoutLacks", kSmall, [](auto& p) { p[Plane::kLevels].resize(2); },
               "expected 0 bytes"},
        Damage{"CodeOutOfRange", kSmall,
               [](auto& p) { write_bits(p[Plane::kCodes].data() + 2 * 3, 5, 5, 24); },
               "row 3: group 1: expected a code below 24, found 24"},
        Damage{"UnusedCodeBits", kSmall,
               [](auto& p) { write_bits(p[Plane::kCodes].data() + 2 * 4, 15, 1, 1); }, "row 4: unused bits"},
        Damage{"KeptPaddingInPlaceOfAColumn", kSmall,  // support {0, 2}: column 11 does not exist
               [](auto& p) { write_bits(p[Plane::kCodes].data(), 10, 5, 1 << 2); },
               "row 0: last group: expected 2 kept among its 2 columns, found 1"},
        Damage{"ScaleNan", kSmall, [](auto& p) { set_half(p[Plane::kScales], 2, kNan); },
               "row 2: column block 0"},
        Damage{"ScaleNegative", kSmall, [](auto& p) { set_half(p[Plane::kScales], 4, kMinusOne); }, "row 4"},
        Damage{"RowScaleInfinite", kCoded, [](auto& p) { set_half(p[Plane::kRowScales], 1, kInfinity); },
               "row 1: the row scale"},
        Damage{"LevelNegative", kCoded, [](auto& p) { set_half(p[Plane::kLevels], 3, kMinusOne); },
               "'levels': slot 3"},
        Damage{"UnusedScaleCodeBits", kCoded,
               [](auto& p) { write_bits(p[Plane::kScaleCodes].data() + 2, 15, 1, 1); },
               "row 1: unused bits after the last scale code"},
        Damage{"UnusedSalientBits", kCoded,
               [](auto& p) { write_bits(p[Plane::kSalientSigns].data(), 13, 1, 1); },
               "'salient_signs': column 1 of 3"},
        Damage{"SalientLevel", Layout{.rows = 1, .cols = 4, .nm = {4, 4}, .levels = 2, .salient = 4},
               [](auto& p) { write_bits(p[Plane::kCodes].data(), 0, 8, 1 << 6); },
               "salient column 2: expected level 0, found 1"},
        Damage{"ColumnsNotAscending", kCoded, [](auto& p) { set_column(p[Plane::kSalientColumns], 0, 299); },
               "'salient_columns': expected ascending columns below 300"},
        Damage{"ColumnNegative", kCoded, [](auto& p) { set_column(p[Plane::kOutlierColumns], 0, -1); },
               "'outlier_columns'"},
        Damage{"ColumnOutOfRange", kCoded, [](auto& p) { set_column(p[Plane::kOutlierColumns], 1, 300); },
               "'outlier_columns'"},
        Damage{"ColumnInBothLists", Layout{.rows = 1, .cols = 4, .nm = {4, 4}, .salient = 1, .outliers = 1},
               [](auto& p) { p[Plane::kOutlierColumns] = p[Plane::kSalientColumns]; },
               "both salient and an outlier"},
        Damage{"OutlierNan", kCoded, [](auto& p) { set_half(p[Plane::kOutlierValues], 7, kNan); },
               "'outlier_values': element 7"}),
    [](const auto& info) { return info.param.name; });

TEST(StructuredBinaryMatrix, RefusesColumnListsThatAreNotAligned) {
  const Layout layout{.rows = 2, .cols = 8, .nm = {4, 8}, .outliers = 1};
  const test::OwnedPlanes planes = test::random_planes(layout, 1);
  StructuredBinaryMatrix::Planes views;
  std::ranges::copy(planes.bytes, views.begin());
  alignas(4) std::array<std::byte, 5> shifted{};
  views[static_cast<size_t>(Plane::kOutlierColumns)] = std::span(shifted).subspan(1);
  EXPECT_THROW(StructuredBinaryMatrix(layout, views, nullptr, "shifted"), Error);
}

TEST(Layout, RefusesFieldsOutOfRange) {
  const Layout good{.rows = 4, .cols = 32, .nm = {2, 4}};
  ASSERT_NO_THROW(good.validate("w"));
  const auto refused = [&](const std::function<void(Layout&)>& change) {
    Layout layout = good;
    change(layout);
    EXPECT_THROW(layout.validate("w"), Error) << describe(layout);
  };
  refused([](Layout& l) { l.rows = 0; });
  refused([](Layout& l) { l.cols = (int64_t{1} << 30) + 1; });
  refused([](Layout& l) { l.nm = {0, 4}; });
  refused([](Layout& l) { l.nm = {5, 4}; });
  refused([](Layout& l) { l.nm = {2, 6}; });
  refused([](Layout& l) { l.levels = 0; });
  refused([](Layout& l) { l.levels = 4; });
  refused([](Layout& l) { l.column_block = 0; });
  refused([](Layout& l) { l.column_block = 130; });
  refused([](Layout& l) { l.scale_bits = 3; });
  refused([](Layout& l) { l.scale_bits = 8; });
  refused([](Layout& l) { l.salient = -1; });
  refused([](Layout& l) { l.salient = 17, l.outliers = 16; });
}

TEST(Layout, ByteCountsOfTheLargestMatrixDoNotOverflow) {
  Layout layout{
      .rows = int64_t{1} << 30, .cols = int64_t{1} << 30, .nm = {4, 4}, .levels = 3, .column_block = 4};
  layout.outliers = layout.cols / 2;
  layout.salient = layout.cols / 2;
  ASSERT_NO_THROW(layout.validate("w"));
  for (const Plane plane : kAllPlanes) {
    double expected = plane_dtype(plane) == "I32" ? 4 : plane_dtype(plane) == "F16" ? 2 : 1;
    for (const int64_t extent : plane_shape(layout, plane)) expected *= static_cast<double>(extent);
    EXPECT_DOUBLE_EQ(static_cast<double>(plane_bytes(layout, plane)), expected) << plane_name(plane);
  }
}

}  // namespace
}  // namespace stbllm
