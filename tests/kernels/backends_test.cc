// Every backend against the reference.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "stbllm/backend/activations.h"
#include "stbllm/backend/backend.h"
#include "stbllm/backend/builtin.h"
#include "support/processor.h"
#include "support/products.h"
#include "support/random_matrix.h"
#include "support/threads.h"

namespace stbllm {
namespace {

using test::Buffer;
using test::Content;
using test::describe;
using test::random_activations;
using test::run;
using test::tolerances;

// The same tokens over and over: as many as it takes to multiply in another way.
Buffer repeated(const Buffer& x, int64_t times) {
  Buffer y(x.type, x.tokens * times, x.width);
  for (int64_t i = 0; i < times; ++i) std::ranges::copy(x.bytes, y.bytes.begin() + i * std::ssize(x.bytes));
  return y;
}
constexpr int64_t kTimes = 35;

// All codes: those with a lookup form and some of each kind without.
std::vector<Layout> swept_layouts() {
  std::vector<Layout> layouts;
  const auto add = [&](NmPattern nm, int levels, int scale_bits, int64_t salient = 0, int64_t outliers = 0,
                       int block = 128) {
    layouts.push_back({.rows = 70,
                       .cols = 300,
                       .nm = nm,
                       .levels = levels,
                       .column_block = block,
                       .scale_bits = scale_bits,
                       .salient = salient,
                       .outliers = outliers});
  };
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels) {
        if (group == 16 && keep > 3 && keep % 4 != 0) continue;
        add({keep, group}, levels, 4 + (keep + levels) % 3);
        add({keep, group}, levels, 16);
      }
  for (const NmPattern nm : {NmPattern{2, 4}, NmPattern{3, 8}, NmPattern{4, 8}})
    for (const int levels : {1, 3})
      for (const int scale_bits : {5, 16}) {
        add(nm, levels, scale_bits, 7);
        add(nm, levels, scale_bits, 0, 5);
        add(nm, levels, scale_bits, 9, 5);
        for (const int block : {16, 64, 120, 192, 256, 304, 512}) add(nm, levels, scale_bits, 2, 1, block);
        for (const int block : {64, 256, 512}) add(nm, levels, scale_bits, 0, 1, block);
      }
  return layouts;
}

// A product and its reference, computed once for all backends.
struct Case {
  Layout layout;
  StructuredBinaryMatrix matrix;
  Buffer x, expected;
  std::vector<test::Tolerance> tolerance;
};

std::vector<Case> make_cases(Content content, ElementType type) {
  std::vector<Case> cases;
  for (const Layout& layout : swept_layouts()) {
    const auto matrix = test::random_matrix(layout, cases.size(), content);
    Buffer x = random_activations(type, 2, layout.cols, content, cases.size());
    Buffer expected = run("reference", matrix, x);
    std::vector<test::Tolerance> tolerance = tolerances(matrix, x);
    cases.push_back({layout, matrix, std::move(x), std::move(expected), std::move(tolerance)});
  }
  return cases;
}

/// A backend and the processor it believes to be on: with many tokens, those that permute bytes fast look
/// some codes up that the others multiply as integers.
struct Machine {
  std::string_view backend;
  bool permutes_fast = false;
};
void PrintTo(const Machine& machine, std::ostream* out) {
  *out << machine.backend << (machine.permutes_fast ? ", fast permutations" : "");
}

class EveryBackend : public testing::TestWithParam<Machine> {
 protected:
  static std::string_view name() { return GetParam().backend; }

  void SetUp() override {
    try {
      find_backend(name());
    } catch (const Error& error) {
      GTEST_SKIP() << error.what();
    }
  }

 private:
  const test::Assume processor_{assumed_fast_permutations, GetParam().permutes_fast};
};

/// Numbers of threads that every product is tried with, whatever the machine has.
constexpr int kThreadCounts[] = {1, 2, 4};

TEST_P(EveryBackend, IsBitEqualToTheReferenceWhereSumsAreExact) {
  static std::vector<Case> cases = make_cases(Content::kExact, ElementType::kFloat32);
  const Backend& backend = find_backend(name());
  for (Case& c : cases) {
    const auto prepared = backend.prepare(c.matrix);
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16}) {
      Buffer x(type, c.x.tokens, c.x.width), y(ElementType::kFloat32, c.x.tokens, c.layout.rows);
      for (int64_t i = 0; i < x.tokens * x.width; ++i)
        store_element(x.view(), i, load_element(c.x.view(), i));
      backend.matmul(*prepared, x.view(), y.view());
      ASSERT_TRUE(y.bytes == c.expected.bytes)
          << describe(c.layout) << ", element type " << static_cast<int>(type);
      Buffer many_x = repeated(x, kTimes), many_y(ElementType::kFloat32, many_x.tokens, c.layout.rows);
      backend.matmul(*prepared, many_x.view(), many_y.view());
      ASSERT_TRUE(many_y.bytes == repeated(c.expected, kTimes).bytes)
          << describe(c.layout) << ", many tokens, element type " << static_cast<int>(type);
    }
  }
}

TEST_P(EveryBackend, IsBitEqualForAnyNumberOfRowsColumnsAndTokens) {
  for (const NmPattern nm :
       {NmPattern{2, 4}, NmPattern{2, 8}, NmPattern{3, 8}, NmPattern{5, 8}, NmPattern{8, 8}})
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16}) {
      const auto check = [&](int64_t rows, int64_t cols, int64_t tokens) {
        const Layout layout = {.rows = rows, .cols = cols, .nm = nm, .scale_bits = 4};
        const auto matrix = test::random_matrix(layout, 3, Content::kExact);
        Buffer x = random_activations(type, tokens, cols, Content::kExact, 4);
        const Buffer y = run(name(), matrix, x), expected = run("reference", matrix, x);
        ASSERT_TRUE(y.bytes == expected.bytes) << describe(layout) << ", tokens " << tokens;
      };
      for (int64_t rows = 1; rows <= 70; ++rows) check(rows, 40, 1);
      for (const int64_t rows : {127, 128, 129, 192, 321}) check(rows, 128, 2);
      for (const int64_t cols : {1, 3, 4, 7, 8, 9, 127, 128, 129, 255, 256, 257, 640}) check(5, cols, 2);
      for (int64_t tokens = 1; tokens <= 18; ++tokens) check(65, 132, tokens);
      for (const int64_t tokens : {31, 32, 33, 50, 67, 131}) check(65, 132, tokens);
      for (const int64_t cols : {1, 7, 127, 128, 129, 257}) check(70, cols, 65);
      // As many rows as make tables worth their while for many tokens: 16 for each of up to 256 entries.
      check(4100, 132, 33);
    }
}

TEST_P(EveryBackend, StaysWithinFloat32RoundingOnFloat32Activations) {
  static std::vector<Case> cases = make_cases(Content::kReal, ElementType::kFloat32);
  for (Case& c : cases) {
    Buffer y = run(name(), c.matrix, c.x);
    for (size_t i = 0; i < c.tolerance.size(); ++i)
      ASSERT_NEAR(load_element(y.view(), i), load_element(c.expected.view(), i), c.tolerance[i].any)
          << describe(c.layout) << ", result " << i;
  }
}

TEST_P(EveryBackend, StaysWithinBfloat16RoundingOnBfloat16Activations) {
  static std::vector<Case> cases = make_cases(Content::kReal, ElementType::kBFloat16);
  for (Case& c : cases)
    for (const int64_t times : {int64_t{1}, kTimes}) {
      Buffer x = repeated(c.x, times), y = run(name(), c.matrix, x);
      const auto results = static_cast<int64_t>(c.tolerance.size());
      for (int64_t i = 0; i < results; ++i)
        ASSERT_NEAR(load_element(y.view(), i), load_element(c.expected.view(), i),
                    c.tolerance[i].of(name(), x))
            << describe(c.layout) << ", result " << i << ", tokens " << x.tokens;
      for (int64_t i = results; i < times * results; ++i)
        ASSERT_EQ(load_element(y.view(), i), load_element(y.view(), i % results))
            << describe(c.layout) << ", result " << i;
    }
}

// Every weight the largest level, whose mantissa is as large as fp16 has, and activations as large as their
// grid takes: sums that overflowed would change their sign. The grid of lookups is then at most 2^-7 of a
// product, half of which may be lost.
TEST_P(EveryBackend, HoldsTheLargestSums) {
  for (const int levels : {1, 2, 3}) {
    const Layout layout = {.rows = 64, .cols = 128, .nm = {4, 4}, .levels = levels, .scale_bits = 4};
    test::OwnedPlanes planes = test::random_planes(layout, 23, Content::kExact);
    for (int64_t row = 0; row < layout.rows; ++row)
      for (int64_t group = 0; group < layout.groups(); ++group) {
        uint64_t digits = 0;
        for (int k = 0; k < 4; ++k) digits = digits * levels + (levels - 1);
        write_bits(planes[Plane::kCodes].data() + row * layout.code_row_bytes(), group * layout.code_bits(),
                   layout.code_bits(), digits << 4);
      }
    for (int l = 0; l < levels; ++l)
      test::detail::store_half(planes[Plane::kLevels], l,
                               l + 1 == levels ? 2047.0f / 1024 : 0.5f + 0.25f * l);
    const StructuredBinaryMatrix matrix = planes.matrix(layout);
    ASSERT_EQ(std::fabs(matrix.at(0, 0) / matrix.at(0, 127)), 1.0f);
    for (const int64_t tokens : {1, 40})
      for (const float sign : {1.0f, -1.0f}) {
        Buffer x(ElementType::kBFloat16, tokens, layout.cols);
        for (int64_t i = 0; i < tokens * layout.cols; ++i) store_element(x.view(), i, sign * 1.984375f);
        Buffer y = run(name(), matrix, x), expected = run("reference", matrix, x);
        for (int64_t i = 0; i < tokens * layout.rows; ++i)
          ASSERT_NEAR(load_element(y.view(), i), load_element(expected.view(), i),
                      0x1p-8f * std::fabs(load_element(expected.view(), i)))
              << levels << " levels, " << tokens << " tokens";
      }
  }
}

TEST_P(EveryBackend, MultipliesSeveralMatricesLikeEachAlone) {
  // Of different codes, sizes and exact columns, some with equal tables; wide enough for more than one set of
  // tables.
  constexpr int64_t kCols = 1100;
  std::vector<StructuredBinaryMatrix> matrices;
  for (const auto& [rows, nm, levels, outliers] :
       std::vector<std::tuple<int64_t, NmPattern, int, int64_t>>{{70, {3, 8}, 1, 0},
                                                                 {700, {3, 8}, 1, 0},
                                                                 {65, {2, 4}, 3, 2},
                                                                 {130, {3, 8}, 1, 2},
                                                                 {64, {4, 8}, 1, 0},
                                                                 {9, {2, 4}, 1, 0}})
    matrices.push_back(test::random_matrix(
        {.rows = rows, .cols = kCols, .nm = nm, .levels = levels, .scale_bits = 4, .outliers = outliers},
        21 + rows));
  const Backend& backend = find_backend(name());
  for (const int64_t tokens : {1, 5, 20, 40}) {
    Buffer x = random_activations(ElementType::kBFloat16, tokens, kCols, Content::kReal, 22);
    std::vector<std::unique_ptr<PreparedMatrix>> prepared;
    std::vector<Buffer> together;
    for (const auto& matrix : matrices) {
      prepared.push_back(backend.prepare(matrix));
      together.emplace_back(ElementType::kFloat32, tokens, matrix.layout().rows);
    }
    std::vector<Product> products;
    for (size_t i = 0; i < matrices.size(); ++i) products.push_back({prepared[i].get(), together[i].view()});
    for (const int count : kThreadCounts) {
      {
        const test::Threads threads(count);
        backend.matmul_all(products, x.view());
      }
      for (size_t i = 0; i < matrices.size(); ++i)
        EXPECT_TRUE(together[i].bytes == run(name(), matrices[i], x).bytes)
            << describe(matrices[i].layout()) << ", tokens " << tokens << ", threads " << count;
    }
  }
}

/// The result with one thread, after every other number of threads gave the same bytes.
template <typename Matrix>
Buffer run_with_threads(std::string_view backend, const Matrix& matrix, Buffer& x, const std::string& what) {
  std::vector<Buffer> results;
  for (const int count : kThreadCounts) {
    const test::Threads threads(count);
    results.push_back(run(backend, matrix, x));
    EXPECT_TRUE(results.back().bytes == results.front().bytes)
        << what << ", tokens " << x.tokens << ", threads " << count;
  }
  return results.front();
}

/// Large enough that there is work for four threads (2^17 products each) with one token and with many; 1000
/// rows are 16 tiles, the last of them cut off.
TEST_P(EveryBackend, GivesTheSameBytesForAnyNumberOfThreads) {
  for (const NmPattern nm : {NmPattern{2, 4}, NmPattern{3, 8}, NmPattern{6, 8}, NmPattern{3, 16}})
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16}) {
      const Layout layout = {.rows = 1000, .cols = 1100, .nm = nm, .scale_bits = 5, .outliers = 3};
      const auto matrix = test::random_matrix(layout, 9, Content::kExact);
      for (const int64_t tokens : {1, 5, 20, 40}) {
        Buffer x = random_activations(type, tokens, layout.cols, Content::kExact, 10);
        const Buffer result = run_with_threads(name(), matrix, x, describe(layout));
        if (tokens > 5) continue;  // the reference takes its time
        EXPECT_TRUE(result.bytes == run("reference", matrix, x).bytes)
            << describe(layout) << ", tokens " << tokens;
        x = random_activations(type, tokens, layout.cols, Content::kReal, 10);
        run_with_threads(name(), matrix, x, describe(layout) + ", any values");
      }
    }
}

TEST_P(EveryBackend, GivesATokenTheSameResultInAnyCompany) {
  for (const NmPattern nm : {NmPattern{2, 4}, NmPattern{3, 8}, NmPattern{6, 8}, NmPattern{3, 16}}) {
    const Layout layout = {.rows = 200, .cols = 500, .nm = nm, .scale_bits = 5};
    const auto matrix = test::random_matrix(layout, 11);
    // Few, and so many that another way is taken.
    for (const auto& [company, fewer] : {std::pair<int64_t, int64_t>{31, 1}, {70, 40}}) {
      Buffer x = random_activations(ElementType::kBFloat16, company, layout.cols, Content::kReal, 12);
      const Buffer all = run(name(), matrix, x);
      Buffer last(ElementType::kBFloat16, fewer, layout.cols);
      std::copy(x.bytes.end() - std::ssize(last.bytes), x.bytes.end(), last.bytes.begin());
      const Buffer alone = run(name(), matrix, last);
      ASSERT_TRUE(
          std::equal(alone.bytes.begin(), alone.bytes.end(), all.bytes.end() - std::ssize(alone.bytes)))
          << describe(layout) << ", " << fewer << " of " << company;
    }
  }
}

TEST_P(EveryBackend, WritesEveryElementType) {
  const Layout layout = {.rows = 70, .cols = 130, .nm = {2, 4}, .scale_bits = 4};
  const auto matrix = test::random_matrix(layout, 13);
  Buffer x = random_activations(ElementType::kBFloat16, 2, layout.cols, Content::kReal, 14);
  const Backend& backend = find_backend(name());
  const auto prepared = backend.prepare(matrix);
  Buffer floats(ElementType::kFloat32, 2, layout.rows);
  backend.matmul(*prepared, x.view(), floats.view());
  for (const ElementType type : {ElementType::kBFloat16, ElementType::kFloat16}) {
    Buffer y(type, 2, layout.rows), expected(type, 2, layout.rows);
    backend.matmul(*prepared, x.view(), y.view());
    for (int64_t i = 0; i < 2 * layout.rows; ++i)
      store_element(expected.view(), i, load_element(floats.view(), i));
    EXPECT_TRUE(y.bytes == expected.bytes);
  }
}

TEST_P(EveryBackend, PassesActivationsThatAreNotFiniteOn) {
  for (const int levels : {1, 3})
    for (const int64_t tokens : {2, 40})
      for (const bool exact_column : {false, true})
        for (const float poison : {NAN, INFINITY}) {
          const Layout layout = {
              .rows = 8, .cols = 256, .nm = {4, 4}, .levels = levels, .scale_bits = 4, .outliers = 1};
          const auto matrix = test::random_matrix(layout, 15, Content::kExact);
          Buffer x = random_activations(ElementType::kBFloat16, tokens, layout.cols, Content::kExact, 16);
          const int64_t exact = matrix.outlier_columns()[0];
          store_element(x.view(), layout.cols + (exact_column ? exact : (exact + 100) % layout.cols), poison);
          Buffer y = run(name(), matrix, x);
          for (int64_t r = 0; r < layout.rows; ++r) {
            EXPECT_TRUE(std::isfinite(load_element(y.view(), r)));
            if (exact_column && matrix.at(r, exact) == 0)
              continue;  // some ways leave infinity times zero out
            EXPECT_FALSE(std::isfinite(load_element(y.view(), layout.rows + r)))
                << levels << " " << tokens << " " << exact_column;
          }
        }
}

// Integers of all sizes, -128 among them, and scales that are powers of two.
struct OwnedRows {
  QuantizedRows::Layout layout;
  std::vector<std::byte> codes, scales;
  OwnedRows(int64_t rows, int64_t cols, int bits) : layout{rows, cols, bits} {
    std::mt19937_64 rng(rows + cols);
    codes.resize(static_cast<size_t>(rows * layout.code_row_bytes()));
    scales.resize(static_cast<size_t>(2 * rows * layout.column_blocks()));
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t col = 0; col < cols; ++col)
        write_bits(codes.data() + row * layout.code_row_bytes(), col * bits, bits, rng());
    for (int64_t i = 0; i < std::ssize(scales) / 2; ++i) {
      const uint16_t half = float_to_half(rng() % 2 ? 0.5f : -1.0f);
      std::memcpy(&scales[2 * i], &half, sizeof half);
    }
  }
  QuantizedRows view() const { return {layout, codes, scales, nullptr, "rows"}; }
};

TEST_P(EveryBackend, IsBitEqualOnRowsOfIntegersWhereSumsAreExact) {
  for (const int bits : {8, 4})
    for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16}) {
      const auto check = [&](int64_t rows, int64_t cols, int64_t tokens) {
        const OwnedRows owned(rows, cols, bits);
        Buffer x = random_activations(type, tokens, cols, Content::kExact, 4);
        const Buffer y = run(name(), owned.view(), x), expected = run("reference", owned.view(), x);
        ASSERT_TRUE(y.bytes == expected.bytes)
            << bits << " bits, " << rows << " x " << cols << ", " << tokens << " tokens";
      };
      for (const int64_t rows : {1, 63, 64, 65, 200}) check(rows, 96, 1);
      for (const int64_t cols : {1, 2, 63, 64, 65, 75, 128, 300})
        for (const int64_t tokens : {2, 40}) check(70, cols, tokens);
      for (const int64_t tokens : {3, 7, 8, 9, 23, 24, 25, 131}) check(130, 75, tokens);
    }
}

TEST_P(EveryBackend, StaysWithinRoundingOnRowsOfIntegers) {
  const OwnedRows owned(150, 300, 8);
  for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16})
    for (const int64_t tokens : {1, 8, 40}) {
      Buffer x = random_activations(type, tokens, 300, Content::kReal, 5);
      Buffer y = run(name(), owned.view(), x), expected = run("reference", owned.view(), x);
      std::vector<float> row(300);
      for (int64_t r = 0; r < 150; ++r) {
        owned.view().decode_row(r, row.data());
        for (int64_t t = 0; t < tokens; ++t) {
          // A float32 addition per column; and activations as multiples of at most 2^-14 of the largest
          // among 64.
          float bound = 0;
          for (int64_t first = 0; first < 300; first += 64) {
            float products = 0, weights = 0, largest = 0;
            for (int64_t c = first; c < std::min<int64_t>(300, first + 64); ++c) {
              const float magnitude = std::fabs(load_element(x.view(), t * 300 + c));
              products += std::fabs(row[c]) * magnitude;
              weights += std::fabs(row[c]);
              largest = std::max(largest, magnitude);
            }
            bound += 302 * 0x1p-24f * products +
                     (type == ElementType::kFloat32 ? 0 : 0x1p-15f * largest * weights);
          }
          ASSERT_NEAR(load_element(y.view(), t * 150 + r), load_element(expected.view(), t * 150 + r), bound)
              << tokens << " tokens";
        }
      }
      // Three tiles, so that two threads share the second.
      run_with_threads(name(), owned.view(), x, "rows of integers");
      for (const float poison : {NAN, INFINITY}) {
        store_element(x.view(), 299, poison);
        const Buffer poisoned = run(name(), owned.view(), x);
        for (int64_t i = 0; i < tokens * 150; ++i)
          EXPECT_EQ(std::isfinite(load_element(Buffer(poisoned).view(), i)), i >= 150) << tokens << " tokens";
      }
    }
}

TEST_P(EveryBackend, RefusesActivationsOfAnotherWidth) {
  const auto matrix = test::random_matrix({.rows = 8, .cols = 16, .nm = {2, 4}}, 17);
  const Backend& backend = find_backend(name());
  const auto prepared = backend.prepare(matrix);
  Buffer x(ElementType::kFloat32, 1, 15), y(ElementType::kFloat32, 1, 8);
  EXPECT_THROW(backend.matmul(*prepared, x.view(), y.view()), Error);
}

TEST_P(EveryBackend, HoldsLittleMoreThanTheFile) {
  // What prepare() may add: padding of rows and columns (none here), a bit per group where a code does not
  // fit its form, scale codes as bytes, and tables that do not grow with the matrix. AVX2 and NEON have
  // nibbles only, of two columns.
  for (const NmPattern nm :
       {NmPattern{1, 8}, NmPattern{2, 8}, NmPattern{2, 4}, NmPattern{3, 8}, NmPattern{4, 8}}) {
    const Layout layout = {.rows = 1024, .cols = 4096, .nm = nm, .scale_bits = 4};
    const auto matrix = test::random_matrix(layout, 18);
    const bool has_nibbles = name() == "cpu-avx2" || name() == "cpu-avxvnni" || name() == "cpu-neon";
    const double nibbles = has_nibbles ? static_cast<double>(layout.rows * layout.cols) / 4 : 0;
    EXPECT_LE(find_backend(name()).prepare(matrix)->bytes(),
              std::max(1.15 * static_cast<double>(matrix.bytes()), 1.1 * nibbles) + 32768)
        << describe(layout);
  }
}

/// The measure of all others adds up in float64, a row per thread.
TEST(ReferenceBackend, GivesTheSameBytesForAnyNumberOfThreads) {
  const Layout layout = {.rows = 70, .cols = 300, .nm = {3, 8}, .scale_bits = 5, .outliers = 3};
  Buffer x = random_activations(ElementType::kBFloat16, 5, layout.cols, Content::kReal, 10);
  run_with_threads("reference", test::random_matrix(layout, 9), x, describe(layout));
}

/// One matrix element by element: what the reference makes of unit vectors.
TEST(ReferenceBackend, MultipliesByEveryElement) {
  const Layout layout = {.rows = 9, .cols = 40, .nm = {2, 4}, .levels = 3, .scale_bits = 4, .outliers = 2};
  const auto matrix = test::random_matrix(layout, 19);
  Buffer x(ElementType::kFloat32, layout.cols, layout.cols);
  for (int64_t c = 0; c < layout.cols; ++c) store_element(x.view(), c * layout.cols + c, 1.0f);
  Buffer y = run("reference", matrix, x);
  for (int64_t r = 0; r < layout.rows; ++r)
    for (int64_t c = 0; c < layout.cols; ++c)
      EXPECT_EQ(load_element(y.view(), c * layout.rows + r), matrix.at(r, c)) << r << ", " << c;
}

std::vector<Machine> machines() {
  std::vector<Machine> result;
  for (const CpuIsa isa : kCpuIsas) result.push_back({cpu_backend(isa).name()});
  for (const char* name : {"cpu-avx2", "cpu-avx512"})  // the others have no choice
    result.push_back({name, /*permutes_fast=*/true});
  return result;
}

INSTANTIATE_TEST_SUITE_P(Backends, EveryBackend, testing::ValuesIn(machines()), [](const auto& info) {
  std::string name(info.param.backend);
  std::erase(name, '-');
  return name + (info.param.permutes_fast ? "_fast_permutations" : "");
});

}  // namespace
}  // namespace stbllm
