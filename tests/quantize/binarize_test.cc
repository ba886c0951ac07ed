// The searches by running sums against the definition, evaluated candidate by candidate in double.

#include "stbllm/quantize/binarize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "stbllm/quantize/nm_select.h"

namespace stbllm {
namespace {

ColumnBlock random_block(int64_t cols, int64_t rows, uint64_t seed) {
  at::manual_seed(seed);
  const at::Tensor values = at::randn({cols, rows}) * (0.5 + at::rand({1, rows}));
  return {values, nm_mask(values.abs().contiguous(), {4, 8}), 0.1 + at::rand({cols})};
}

/// Squared error of the members of one row, without means, order by order.
double set_error(const std::vector<double>& values, const std::vector<double>& weights, int orders) {
  std::vector<double> residual = values;
  for (int order = 0; order < orders && !values.empty(); ++order) {
    double scale = 0;
    for (const double x : residual) scale += std::fabs(x);
    scale /= static_cast<double>(residual.size());
    for (double& x : residual) x -= x < 0 ? -scale : scale;
  }
  double error = 0;
  for (size_t i = 0; i < residual.size(); ++i) error += weights[i] * residual[i] * residual[i];
  return error;
}

/// Error of the block when `set_of(column, |x|)` names the set of each kept weight, -1 for none; set 0 is
/// binarized twice.
template <typename SetOf>
double block_error(const ColumnBlock& block, SetOf&& set_of) {
  const auto values = block.values.accessor<float, 2>();
  const auto kept = block.kept.accessor<uint8_t, 2>();
  double error = 0;
  for (int64_t row = 0; row < values.size(1); ++row) {
    std::vector<double> members[4], weights[4];
    for (int64_t c = 0; c < values.size(0); ++c) {
      const int set = kept[c][row] ? set_of(c, std::fabs(values[c][row])) : -1;
      if (set < 0) continue;
      members[set].push_back(values[c][row]);
      weights[set].push_back(block.weight[c].item<double>());
    }
    for (int set = 0; set < 4; ++set) error += set_error(members[set], weights[set], set == 0 ? 2 : 1);
  }
  return error;
}

class Search : public ::testing::TestWithParam<std::pair<int, int>> {
};  // (cols, rows), also those that fill no tile

TEST_P(Search, FindsTheSalientCountWithTheSmallestError) {
  const ColumnBlock block = random_block(GetParam().first, GetParam().second, 1);
  std::vector<int64_t> order(block.values.size(0));
  std::iota(order.rbegin(), order.rend(), 0);  // any order will do: here from the last column
  const int most = 12;
  const auto error = [&](int count) {
    return block_error(block,
                       [&](int64_t column, float) { return column >= block.values.size(0) - count ? 0 : 1; });
  };
  double smallest = std::numeric_limits<double>::infinity();
  for (int count = 0; count <= most; ++count) smallest = std::min(smallest, error(count));
  // 1e-5: the residuals of the second order are summed in float32.
  EXPECT_NEAR(error(search_salient(block, order, 0, most, 1, /*means=*/false)) / smallest, 1.0, 1e-5);
}

TEST_P(Search, FindsTheThresholdWithTheSmallestError) {
  const ColumnBlock block = random_block(GetParam().first, GetParam().second, 2);
  std::vector<uint8_t> salient(block.values.size(0), 0);
  salient[3] = 1;
  std::vector<float> thresholds;
  for (int i = 0; i < 40; ++i) thresholds.push_back(0.2f + 0.04f * static_cast<float>(i));
  for (const int levels : {2, 3}) {
    const auto error = [&](float p1) {
      return block_error(block, [&](int64_t column, float x) {
        return salient[column] ? -1 : 1 + (x >= p1) + (levels == 3 && x >= 2 * p1);
      });
    };
    double smallest = std::numeric_limits<double>::infinity();
    for (const float p1 : thresholds) smallest = std::min(smallest, error(p1));
    // 1e-5: sums over a row are float32.
    EXPECT_NEAR(error(search_regions(block, salient, thresholds, levels, false, false)) / smallest, 1.0, 1e-5)
        << levels << " levels";
  }
}

TEST_P(Search, BinarizedSetsHaveTheErrorOfTheDefinition) {
  const ColumnBlock block = random_block(GetParam().first, GetParam().second, 3);
  std::vector<uint8_t> salient(block.values.size(0), 0);
  salient[0] = salient[5] = 1;
  const float p1 = 0.7f;
  const at::Tensor sets = assign_sets(block, salient, p1, 3);
  const at::Tensor q = binarize_sets(block.values, sets, 3, /*means=*/false).dequantize(sets, 3);
  const at::Tensor difference = (q - block.values) * block.kept;
  const double error = (difference.square() * block.weight.unsqueeze(1)).sum(at::kDouble).item<double>();
  const double expected = block_error(
      block, [&](int64_t column, float x) { return salient[column] ? 0 : 1 + (x >= p1) + (x >= 2 * p1); });
  EXPECT_NEAR(error / expected, 1.0, 1e-5);  // float32 scales
  EXPECT_TRUE(at::equal(q.ne(0), block.kept.ne(0)));
}

INSTANTIATE_TEST_SUITE_P(Shapes, Search,
                         ::testing::Values(std::pair(128, 64), std::pair(64, 37), std::pair(24, 5)));

TEST(NmMask, KeepsTheLargestAndOfEqualsTheFirst) {
  const at::Tensor score = at::tensor({1.f, 3.f, 3.f, 3.f, 0.f, 0.f, 0.f, 0.f}).unsqueeze(1);
  EXPECT_TRUE(at::equal(nm_mask(score, {2, 4}).flatten(), at::tensor({0, 1, 1, 0, 1, 1, 0, 0}, at::kByte)));
}

TEST(NmMask, KeepsAsManyAsThereAreInANarrowLastGroup) {
  const at::Tensor mask = nm_mask(at::rand({10, 33}), {4, 8});
  EXPECT_TRUE(mask.narrow(0, 0, 8).sum(0).eq(4).all().item<bool>());
  EXPECT_TRUE(mask.narrow(0, 8, 2).eq(1).all().item<bool>());
}

}  // namespace
}  // namespace stbllm
