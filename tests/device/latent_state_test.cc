// The steps of training as operations of libtorch against the loops over lanes, for the codes that presets
// and budgets use, on the CPU and on the test device.

#include "stbllm/train/latent_state.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "stbllm/quantize/quantize_linear.h"
#include "stbllm/recipe/recipe.h"
#include "stbllm/train/latent_weight.h"
#include "support/processor.h"
#include "support/test_device.h"

namespace stbllm {
namespace {

using test::test_device;

/// 76 columns end in half a group of 8, and are no multiple of the column block either.
constexpr int64_t kRows = 40, kCols = 76;

struct Layer {
  at::Tensor original;
  BinarizedWeight weight;
};

Layer make_layer(const Scheme& scheme, int scale_bits) {
  at::manual_seed(7);
  Layer layer;
  layer.original = at::randn({kRows, kCols}) * 0.05;
  StatsAccumulator accumulator(kCols, {});
  const at::Tensor inputs = at::randn({4 * kCols, kCols});
  inputs.select(1, 3).mul_(30);  // a column that carries outsized activations
  accumulator.add(inputs, false);
  LeanMethod method = std::get<LeanMethod>(Recipe::load("stbllm").method);
  method.column_block = 32;
  method.scale_bits = scale_bits;
  layer.weight = quantize_linear(layer.original, accumulator.finish(), method, {.scheme = scheme});
  return layer;
}

std::vector<std::pair<Scheme, int>> cases() {
  std::vector<std::pair<Scheme, int>> cases;
  for (const NmPattern nm : {NmPattern{1, 4}, {2, 4}, {3, 4}, {1, 8}, {2, 8}, {3, 8}, {5, 8}})
    for (const int levels : {1, 2, 3})
      // The states of 5:8 with several levels are too many to try in a test.
      if (nm.keep < 5 || levels == 1) cases.push_back({{.nm = nm, .levels = levels}, 4});
  cases.push_back({{.nm = {3, 4}, .levels = 1}, 16});
  return cases;
}

class LatentStateTest : public test::InBothProducts {};
STBLLM_INSTANTIATE_PRODUCTS(LatentStateTest);

at::Tensor symbols_of(const LatentState& state, void (*project)(const LatentState&, const at::Tensor&)) {
  const at::Tensor symbols = at::empty_like(state.latent, at::kChar);
  project(state, symbols);
  return symbols.cpu();
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kFloat) - b.to(at::kFloat)).abs().max().item<double>();
}

/// The compiler may fuse multiplications and additions of the loops, and sums over a row have another order:
/// parts in 2^24 of each number, which may round a mean to the neighbouring bfloat16, 2^-8 of it, and a
/// latent to its neighbour. A step moves a latent by at most `rate`, so that the difference of a few steps
/// stays below 2^-6 of what all of them may move. Gains have float32 moments.
TEST_P(LatentStateTest, TensorsFollowTheLoops) {
  constexpr int kSteps = 6;
  constexpr double kRate = 0.1;
  for (const auto& [scheme, scale_bits] : cases())
    for (const bool train_codes : {true, false}) {
      SCOPED_TRACE(fmt::format("{}, scales of {} bits, codes {}", scheme.str(), scale_bits, train_codes));
      const Layer layer = make_layer(scheme, scale_bits);
      ASSERT_TRUE(layer.weight.has_outliers());
      const LatentState loops(layer.weight, layer.original, train_codes),
          tensors(layer.weight, layer.original, train_codes),
          device(layer.weight, layer.original.to(test_device()), train_codes);
      ASSERT_EQ(device.dense.device(), test_device());
      by_lanes::project(loops, {});
      by_tensors::project(tensors, {});
      by_tensors::project(device, {});
      EXPECT_TRUE(tensors.dense.equal(loops.dense));
      const at::Tensor first = symbols_of(loops, by_lanes::project);
      EXPECT_TRUE(symbols_of(tensors, by_tensors::project).equal(first));
      for (int step = 1; step <= kSteps; ++step) {
        const at::Tensor gradient =
            ((loops.dense.to(at::kFloat) - layer.original) * 3 + at::randn({kRows, kCols}) * 0.02)
                .index_fill_(1, loops.outlier_columns, 0)
                .to(loops.dense.scalar_type());
        const TuneRates rates{.gains = kRate / 4, .codes = kRate};
        by_lanes::step(loops, gradient, rates, step);
        by_lanes::project(loops, {});
        by_tensors::step(tensors, gradient, rates, step);
        by_tensors::project(tensors, {});
        const at::Tensor on_device = gradient.to(test_device());
        const test::Transfers before = test::transfers();
        by_tensors::step(device, on_device, rates, step);
        by_tensors::project(device, {});
        const test::Transfers crossed = test::transfers() - before;
        EXPECT_EQ(crossed.to_device + crossed.to_host + crossed.waits, 0);
      }
      const at::Tensor symbols = symbols_of(loops, by_lanes::project);
      EXPECT_EQ(symbols.equal(first), !train_codes);
      EXPECT_GT(loops.row_gain.abs().min().item<double>(), 0);
      EXPECT_EQ(loops.level_gain.abs().min().item<double>() > 0, scheme.levels > 1);
      EXPECT_LE(largest_difference(tensors.latents(), loops.latents()),
                kSteps * (kRate * 0x1p-6 + loops.latent_step));
      // Both round by the same chances.
      EXPECT_LE(tensors.latent.ne(loops.latent).sum().item<int64_t>(), kRows * kCols / 20);
      if (train_codes) {
        EXPECT_TRUE(at::allclose(tensors.row_square, loops.row_square, 1e-5, 0));
        EXPECT_TRUE(at::allclose(tensors.column_square, loops.column_square, 1e-5, 0));
      }
      EXPECT_LE(largest_difference(tensors.row_gain, loops.row_gain), 1e-4);
      EXPECT_LE(largest_difference(tensors.level_gain, loops.level_gain), 1e-4);
      // A latent on a border, or two that compete for a place, may fall to either side.
      const at::Tensor other = symbols_of(tensors, by_tensors::project), same = other.eq(symbols);
      EXPECT_LE(other.ne(symbols).sum().item<int64_t>(), kRows * kCols / 200);
      const at::Tensor distance = (tensors.dense.to(at::kFloat) - loops.dense.to(at::kFloat)).abs();
      const double rounding = loops.dense.scalar_type() == at::kBFloat16 ? 0x1p-7 : 1e-3;
      EXPECT_TRUE(same.logical_not()
                      .logical_or(distance.le(loops.dense.to(at::kFloat).abs() * rounding))
                      .all()
                      .item<bool>());
      // The device computes what the CPU does with the same operations.
      EXPECT_TRUE(device.latent.cpu().equal(tensors.latent));
      EXPECT_TRUE(device.row_gain.cpu().equal(tensors.row_gain));
      EXPECT_TRUE(device.level_gain.cpu().equal(tensors.level_gain));
      EXPECT_TRUE(symbols_of(device, by_tensors::project).equal(other));
      EXPECT_TRUE(device.dense.cpu().equal(tensors.dense.to(device.dense.scalar_type())));
    }
}

/// Among equal magnitudes the earlier column is kept, zeros included.
TEST_P(LatentStateTest, EqualMagnitudesAreKeptFromTheLeft) {
  for (const auto& [scheme, scale_bits] : cases()) {
    SCOPED_TRACE(scheme.str());
    const Layer layer = make_layer(scheme, scale_bits);
    const LatentState state(layer.weight, layer.original, /*train_codes=*/true);
    state.latent.copy_(at::randint(-2, 3, {kRows, kCols}).div(state.latent_step).round());
    const at::Tensor symbols = symbols_of(state, by_lanes::project), dense = state.dense.clone();
    EXPECT_TRUE(symbols_of(state, by_tensors::project).equal(symbols));
    EXPECT_TRUE(state.dense.equal(dense));
  }
}

/// What a linear in training gets on a device comes back to the quantized weight on the CPU.
TEST_P(LatentStateTest, WeightsOfADeviceAreWrittenBack) {
  for (const auto& [scheme, scale_bits] : cases()) {
    SCOPED_TRACE(fmt::format("{}, scales of {} bits", scheme.str(), scale_bits));
    Layer layer = make_layer(scheme, scale_bits);
    const at::Tensor before = layer.weight.to_dense();
    LatentWeight latent(layer.weight, layer.original.to(test_device()), /*train_codes=*/true);
    EXPECT_EQ(latent.write_back(), 0);
    EXPECT_TRUE(layer.weight.to_dense().equal(before));
    for (int step = 0; step < 10; ++step) {
      latent.dense().square().sum().backward();
      latent.step({0.05, 0.05});
    }
    EXPECT_GT(latent.write_back(), 0);
    // Products are bfloat16 there: half a unit of 8 bits, and one of 11 for the row scales and the levels
    // each.
    const at::Tensor dense = layer.weight.to_dense();
    EXPECT_LE(largest_difference(latent.dense().detach().cpu(), dense),
              (0x1p-8 + 2 * 0x1p-11) * dense.abs().max().item<double>());
    EXPECT_LT(dense.norm().item<double>(), before.norm().item<double>());
  }
}

}  // namespace
}  // namespace stbllm
