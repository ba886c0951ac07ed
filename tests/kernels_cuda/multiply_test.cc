// The GEMM and GEMV kernels in the SIMT harness against StructuredBinaryMatrix::at().

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "emulated_matrix.h"
#include "support/element_bytes.h"
#include "support/random_matrix.h"

namespace stbllm {
namespace {

using cuda::FewTokens;
using cuda::LargeGemm;
using cuda::SmallGemm;
using cuda::SomeTokens;
using test::Content;

enum class Kernel { kGemv, kSmallGemm, kLargeGemm };

struct Case {
  Layout layout;
  int tokens = 1;
  ElementType type = ElementType::kFloat32;
  Kernel kernel = Kernel::kGemv;
  simt::Schedule schedule = {};
};

std::string describe(const Case& c) {
  const Layout& l = c.layout;
  return fmt::format(
      "{} x {}, {}, levels {}, block {}, scale bits {}, salient {}, outliers {}, tokens {}, type {}, kernel "
      "{}",
      l.rows, l.cols, l.nm.str(), l.levels, l.column_block, l.scale_bits, l.salient, l.outliers, c.tokens,
      static_cast<int>(c.type), static_cast<int>(c.kernel));
}

// Elements behind a view, starting at a multiple of 16 bytes.
struct Buffer {
  std::vector<cuda::Words4> words;
  ActivationView view;

  Buffer(ElementType type, int64_t tokens, int64_t width)
      : words(static_cast<size_t>(tokens * width * test::element_bytes(type)) / 16 + 1),
        view{words.data(), type, tokens, width} {}
};

Buffer random_input(const Case& c, Content content) {
  Buffer x(c.type, c.tokens, c.layout.cols);
  std::mt19937 rng(7);
  for (int64_t i = 0; i < c.tokens * c.layout.cols; ++i) {
    const float integer = static_cast<float>(static_cast<int>(rng() % 9) - 4);
    store_element(x.view, i, content == Content::kExact ? integer : std::normal_distribution<float>()(rng));
  }
  return x;
}

Buffer multiply(const Case& c, const StructuredBinaryMatrix& matrix, const Buffer& x) {
  const test::EmulatedMatrix emulated(matrix, c.schedule);
  Buffer y(c.type, c.tokens, c.layout.rows);
  const cuda::InputView input = cuda::view_input(emulated.view(), x.view.data, c.type, c.tokens);
  const cuda::OutputView output{y.view.data, c.type, c.tokens};
  switch (c.kernel) {
    case Kernel::kGemv:
      if (c.tokens <= FewTokens::kMaxTokens)
        emulated.gemv<FewTokens>(input, output);
      else
        emulated.gemv<SomeTokens>(input, output);
      break;
    case Kernel::kSmallGemm:
      emulated.gemm<SmallGemm>(input, output);
      break;
    case Kernel::kLargeGemm:
      emulated.gemm<LargeGemm>(input, output);
      break;
  }
  return y;
}

float unit_roundoff(ElementType type) {
  return type == ElementType::kFloat32 ? 0x1p-24f : type == ElementType::kFloat16 ? 0x1p-11f : 0x1p-8f;
}

// With exact content every product and sum is exact in float32, so results must be equal to the last bit.
// Otherwise a result may differ by what its steps round: activations and weights are rounded to 11 bits
// (2^-12 each, for real data of a narrow range), n terms are added up in float32 in any order (n 2^-24), and
// the result is rounded to its type.
void expect_equal_to_at(const Case& c, Content content) {
  SCOPED_TRACE(describe(c));
  const StructuredBinaryMatrix matrix = test::random_matrix(c.layout, 11, content);
  const Buffer x = random_input(c, content);
  const Buffer y = multiply(c, matrix, x);
  std::vector<float> row(static_cast<size_t>(c.layout.cols));
  for (int64_t r = 0; r < c.layout.rows; ++r) {
    for (int64_t col = 0; col < c.layout.cols; ++col) row[col] = matrix.at(r, col);
    for (int token = 0; token < c.tokens; ++token) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t col = 0; col < c.layout.cols; ++col) {
        const double product =
            static_cast<double>(row[col]) * load_element(x.view, token * c.layout.cols + col);
        sum += product;
        magnitude += std::abs(product);
      }
      const float found = load_element(y.view, token * c.layout.rows + r);
      if (content == Content::kExact) {
        Buffer expected(c.type, 1, 1);
        store_element(expected.view, 0, static_cast<float>(sum));
        ASSERT_EQ(found, load_element(expected.view, 0)) << "row " << r << " token " << token;
      } else {
        const double tolerance = magnitude * (0x1p-11 + static_cast<double>(c.layout.cols) * 0x1p-24) +
                                 std::abs(sum) * unit_roundoff(c.type);
        ASSERT_NEAR(found, sum, tolerance) << "row " << r << " token " << token;
      }
    }
  }
}

Layout layout_of(int64_t rows, int64_t cols, NmPattern nm, int levels = 1) {
  Layout layout;
  layout.rows = rows;
  layout.cols = cols;
  layout.nm = nm;
  layout.levels = levels;
  return layout;
}

TEST(CudaKernels, GemvIsExactForEveryLayout) {
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels)
        expect_equal_to_at({.layout = layout_of(18, 300, {keep, group}, levels), .tokens = 2},
                           Content::kExact);
}

TEST(CudaKernels, GemmIsExactForEveryLayout) {
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels)
        expect_equal_to_at(
            {.layout = layout_of(18, 300, {keep, group}, levels), .tokens = 9, .kernel = Kernel::kSmallGemm},
            Content::kExact);
}

TEST(CudaKernels, GemvIsExactForEveryTokenCountAndType) {
  for (int tokens = 1; tokens <= 16; ++tokens)
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16})
      expect_equal_to_at({.layout = layout_of(40, 264, {2, 4}), .tokens = tokens, .type = type},
                         Content::kExact);
}

TEST(CudaKernels, TailsOfRowsColumnsAndTokens) {
  for (const int64_t rows : {1, 15, 16, 17, 65})
    for (const int64_t cols : {1, 3, 63, 128, 129, 255, 257, 520}) {
      expect_equal_to_at({.layout = layout_of(rows, cols, {2, 4}), .tokens = 3}, Content::kExact);
      expect_equal_to_at({.layout = layout_of(rows, cols, {4, 8}),
                          .tokens = 5,
                          .type = ElementType::kBFloat16,
                          .kernel = Kernel::kSmallGemm},
                         Content::kExact);
    }
}

TEST(CudaKernels, LongRowsRunThroughEveryStageOfTheRings) {
  for (const NmPattern nm : {NmPattern{2, 4}, NmPattern{5, 8}}) {
    expect_equal_to_at({.layout = layout_of(16, 6 * 2048 + 100, nm), .tokens = 1}, Content::kExact);
    expect_equal_to_at({.layout = layout_of(32, 5 * 1024 + 100, nm), .tokens = 9}, Content::kExact);
    expect_equal_to_at({.layout = layout_of(16, 2000, nm), .tokens = 17, .kernel = Kernel::kSmallGemm},
                       Content::kExact);
  }
}

TEST(CudaKernels, LargeGemmIsExactForEveryTileFormat) {
  for (const auto& [nm, levels] : {std::pair{NmPattern{2, 4}, 1},
                                   {NmPattern{2, 8}, 1},
                                   {NmPattern{2, 4}, 3},
                                   {NmPattern{8, 8}, 1},
                                   {NmPattern{4, 8}, 1},
                                   {NmPattern{6, 8}, 3}}) {
    Layout layout = layout_of(150, 520, nm, levels);
    layout.outliers = 3;
    expect_equal_to_at(
        {.layout = layout, .tokens = 133, .type = ElementType::kBFloat16, .kernel = Kernel::kLargeGemm},
        Content::kExact);
  }
}

TEST(CudaKernels, SalientAndOutlierColumns) {
  for (const NmPattern nm : {NmPattern{2, 4}, NmPattern{4, 8}, NmPattern{1, 16}})
    for (const auto& [salient, outliers] : {std::pair{5, 0}, {0, 1}, {16, 16}, {200, 90}})
      for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm}) {
        Layout layout = layout_of(34, 400, nm, salient % 3 + 1);
        layout.salient = salient;
        layout.outliers = outliers;
        expect_equal_to_at({.layout = layout, .tokens = 7, .kernel = kernel}, Content::kExact);
      }
}

TEST(CudaKernels, ColumnBlocksOfAnySize) {
  for (const int block : {8, 64, 120, 136, 256, 384})
    for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm}) {
      Layout layout = layout_of(20, 420, {2, 8});
      layout.column_block = block;
      layout.outliers = 2;
      expect_equal_to_at({.layout = layout, .tokens = 4, .type = ElementType::kFloat16, .kernel = kernel},
                         Content::kExact);
    }
}

TEST(CudaKernels, ScaleCodes) {
  for (const int bits : {4, 5, 6})
    for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm}) {
      Layout layout = layout_of(20, 300, {2, 4}, 3);
      layout.scale_bits = bits;
      layout.salient = 4;
      expect_equal_to_at({.layout = layout, .tokens = 4, .kernel = kernel}, Content::kExact);
      expect_equal_to_at({.layout = layout, .tokens = 4, .kernel = kernel}, Content::kReal);
    }
}

TEST(CudaKernels, RealValuesStayWithinTheRoundingOfTheirTypes) {
  for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16})
    for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm, Kernel::kLargeGemm})
      for (const auto& [nm, levels] :
           {std::pair{NmPattern{2, 4}, 1}, {NmPattern{2, 4}, 3}, {NmPattern{4, 8}, 2}}) {
        Layout layout = layout_of(48, 700, nm, levels);
        layout.salient = 9;
        layout.outliers = 3;
        expect_equal_to_at({.layout = layout, .tokens = 16, .type = type, .kernel = kernel}, Content::kReal);
      }
}

TEST(CudaKernels, ResultsAreThoseOfEverySchedule) {
  using simt::Schedule;
  for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm, Kernel::kLargeGemm})
    for (const auto& [nm, levels] :
         {std::pair{NmPattern{2, 4}, 1}, {NmPattern{2, 4}, 3}, {NmPattern{4, 8}, 1}})
      for (const Schedule::Copies copies : {Schedule::Copies::kAtWait, Schedule::Copies::kAtIssue})
        for (const auto& [order, seed] : {std::pair{Schedule::Order::kAscending, 0u},
                                          {Schedule::Order::kDescending, 0u},
                                          {Schedule::Order::kShuffled, 1u},
                                          {Schedule::Order::kShuffled, 2u}}) {
          Layout layout = layout_of(130, 1300, nm, levels);
          layout.outliers = 2;
          expect_equal_to_at({.layout = layout,
                              .tokens = 12,
                              .kernel = kernel,
                              .schedule = {.order = order, .copies = copies, .seed = seed}},
                             Content::kExact);
        }
}

// fp16 reaches from 2^-24 to 65504: neither a huge nor a tiny token may overflow or vanish on its way through
// it.
TEST(CudaKernels, ActivationsKeepTheirRange) {
  Case c{.layout = layout_of(16, 256, {2, 4}), .tokens = 3};
  const StructuredBinaryMatrix matrix = test::random_matrix(c.layout, 3, Content::kExact);
  for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm}) {
    c.kernel = kernel;
    Buffer x = random_input(c, Content::kExact), scaled = x;
    scaled.view.data = scaled.words.data();
    const float factors[] = {0x1p60f, 0x1p-60f, 0.0f};
    for (int64_t i = 0; i < 3 * 256; ++i)
      store_element(scaled.view, i, load_element(x.view, i) * factors[i / 256]);
    const Buffer y = multiply(c, matrix, x), scaled_y = multiply(c, matrix, scaled);
    for (int64_t i = 0; i < 3 * 16; ++i)
      ASSERT_EQ(load_element(scaled_y.view, i), load_element(y.view, i) * factors[i / 16]);
  }
}

// A product with an infinite or missing number has no finite result, also in rows that prune its column.
TEST(CudaKernels, ActivationsThatAreNotFiniteAreNotLost) {
  for (const float bad : {INFINITY, -INFINITY, NAN})
    for (const Kernel kernel : {Kernel::kGemv, Kernel::kSmallGemm})
      for (const int tokens : {1, 3}) {
        const Case c{.layout = layout_of(16, 300, {2, 4}), .tokens = tokens, .kernel = kernel};
        const StructuredBinaryMatrix matrix = test::random_matrix(c.layout, 3, Content::kExact);
        Buffer x = random_input(c, Content::kExact);
        store_element(x.view, 17, bad);
        const Buffer y = multiply(c, matrix, x);
        for (int64_t r = 0; r < 16; ++r) {
          EXPECT_FALSE(std::isfinite(load_element(y.view, r))) << bad << " row " << r;
          for (int other = 1; other < tokens; ++other)
            EXPECT_TRUE(std::isfinite(load_element(y.view, 16 * other + r)))
                << "token " << other << " row " << r;
        }
      }
}

}  // namespace
}  // namespace stbllm
