// Between tensors and packed bits: nothing is lost in either direction, for every preset and awkward shapes.

#include "stbllm/calibrate/pack_weight.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "stbllm/quantize/quantize_linear.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {
namespace {

/// The presets that have a packed form.
std::vector<std::string> packable_presets() {
  std::vector<std::string> names = Recipe::preset_names();
  std::erase_if(names, [](const std::string& name) { return !has_packed_form(Recipe::load(name).method); });
  return names;
}

struct Shape {
  int64_t rows, cols;
};

/// Correlated inputs, one of which (column 5) is so loud that recipes with outliers store it exactly.
InputStats make_stats(int64_t cols) {
  const at::Tensor mix = at::randn({cols, cols}) / std::sqrt(static_cast<double>(cols)) + at::eye(cols);
  at::Tensor inputs = at::randn({2 * cols + 32, cols}).mm(mix);
  inputs.select(1, 5).mul_(20);
  StatsAccumulator accumulator(cols, {});
  accumulator.add(inputs, /*holdout=*/false);
  accumulator.add(inputs.narrow(0, 0, 32), /*holdout=*/true);
  return accumulator.finish();
}

/// What a plan by budget gives most linears, where the recipe has no scheme of its own.
Scheme scheme_of(const Recipe& recipe) {
  const auto* pattern = std::get_if<PatternAllocation>(&recipe.model.allocation);
  return pattern != nullptr ? pattern->scheme : Scheme{.nm = {2, 8}, .levels = 1};
}

BinarizedWeight quantize(const Shape& shape, const Recipe& recipe) {
  at::manual_seed(shape.rows * 1000 + shape.cols);
  const InputStats stats = make_stats(shape.cols);
  return quantize_linear(at::randn({shape.rows, shape.cols}) * 0.05, stats, recipe.method,
                         {.scheme = scheme_of(recipe)});
}

void expect_same_planes(const StructuredBinaryMatrix& a, const StructuredBinaryMatrix& b) {
  ASSERT_EQ(a.layout(), b.layout());
  for (int p = 0; p < kPlaneCount; ++p) {
    const auto plane = static_cast<Plane>(p);
    EXPECT_TRUE(std::ranges::equal(a.plane(plane), b.plane(plane))) << plane_name(plane);
  }
}

class PackWeight : public ::testing::TestWithParam<std::tuple<std::string, Shape>> {};

TEST_P(PackWeight, LosesNothing) {
  const auto& [preset, shape] = GetParam();
  const Recipe recipe = Recipe::load(preset);
  const BinarizedWeight weight = quantize(shape, recipe);
  const auto* lean = std::get_if<LeanMethod>(&recipe.method);
  EXPECT_EQ(weight.has_outliers(), lean != nullptr && lean->outliers.has_value());
  const StructuredBinaryMatrix matrix = pack_weight(weight, "w");
  EXPECT_EQ(matrix.layout().nm, scheme_of(recipe).nm);

  const at::Tensor dense = weight.to_dense();
  const auto expected = dense.accessor<float, 2>();
  int64_t different = 0;
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t c = 0; c < shape.cols; ++c) different += matrix.at(r, c) != expected[r][c];
  EXPECT_EQ(different, 0);
  EXPECT_TRUE(unpack_weight(matrix).to_dense().equal(dense));
}

TEST_P(PackWeight, IsUndoneByUnpackWeight) {
  const auto& [preset, shape] = GetParam();
  const BinarizedWeight weight = quantize(shape, Recipe::load(preset));
  const StructuredBinaryMatrix matrix = pack_weight(weight, "w");
  const BinarizedWeight again = unpack_weight(matrix);
  EXPECT_TRUE(again.symbols.equal(weight.symbols));
  EXPECT_TRUE(again.to_dense().equal(weight.to_dense()));
  EXPECT_EQ(again.salient_share(), weight.salient_share());
  expect_same_planes(pack_weight(again, "w"), matrix);
}

// Columns: whole column blocks and groups; part of a column block; part of a group of 8; part of a group of 4
// too.
INSTANTIATE_TEST_SUITE_P(Presets, PackWeight,
                         ::testing::Combine(::testing::ValuesIn(packable_presets()),
                                            ::testing::Values(Shape{16, 128}, Shape{33, 168}, Shape{9, 132},
                                                              Shape{7, 131})),
                         [](const auto& info) {
                           const Shape shape = std::get<1>(info.param);
                           std::string name =
                               fmt::format("{}_{}x{}", std::get<0>(info.param), shape.rows, shape.cols);
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

/// No method makes both, but the format has room for both.
TEST(PackWeight, HoldsSalientColumnsAndOutliersTogether) {
  BinarizedWeight weight = quantize({24, 168}, Recipe::load("stbllm-paper"));
  ASSERT_TRUE(weight.has_salient());
  // The first two columns that are not salient.
  std::vector<int> columns;
  for (int c = 0; columns.size() < 2; ++c)
    if (!weight.salient_columns.eq(c).any().item<bool>()) columns.push_back(c);
  weight.outlier_columns = at::tensor(columns, at::kInt);
  weight.outlier_values = at::randn({2, 24}).to(at::kHalf).to(at::kFloat);
  const StructuredBinaryMatrix matrix = pack_weight(weight, "w");
  EXPECT_EQ(matrix.layout().salient, weight.salient_columns.numel());
  EXPECT_EQ(matrix.layout().outliers, 2);
  EXPECT_TRUE(unpack_weight(matrix).to_dense().equal(weight.to_dense()));
  expect_same_planes(pack_weight(unpack_weight(matrix), "w"), matrix);
}

TEST(PackWeight, IsRefusedForWeightsThatDropTheirSupport) {
  const BinarizedWeight weight = quantize({8, 128}, Recipe::load("stbllm-released"));
  EXPECT_THROW(pack_weight(weight, "w"), std::logic_error);
}

}  // namespace
}  // namespace stbllm
