// A weight in training: what it starts as, that its gradients are those of its equation, what it leaves
// behind.

#include "stbllm/train/latent_weight.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/quantize/quantize_linear.h"
#include "stbllm/recipe/recipe.h"
#include "support/processor.h"
#include "support/threads.h"

namespace stbllm {
namespace {

struct Layer {
  at::Tensor original;
  BinarizedWeight weight;
};

/// A layer quantized by a preset; 72 columns are no multiple of 16, so that 16-wide groups have a tail.
Layer make_layer(NmPattern nm, int levels, int64_t rows = 24, int64_t cols = 72) {
  at::manual_seed(7);
  Layer layer;
  layer.original = at::randn({rows, cols}) * 0.05;
  StatsAccumulator accumulator(cols, {});
  at::Tensor inputs = at::randn({4 * cols, cols});
  inputs.select(1, 3).mul_(30);  // a column that carries outsized activations
  accumulator.add(inputs, false);
  LeanMethod method = std::get<LeanMethod>(Recipe::load("stbllm").method);
  method.column_block = 32;
  layer.weight =
      quantize_linear(layer.original, accumulator.finish(), method, {.scheme = {.nm = nm, .levels = levels}});
  return layer;
}

const std::vector<std::pair<NmPattern, int>> kCodes = {
    {{2, 4}, 1}, {{2, 4}, 3}, {{3, 8}, 1}, {{4, 8}, 2}, {{5, 16}, 1}};

/// How far a weight of the forward pass may be from the weight it stands for, relative to it: half a unit of
/// 8 bits, or what is lost between a latent in units of a scale and the product, in float32.
double rounding_of(const LatentWeight& latent) {
  return latent.dense().scalar_type() == at::kBFloat16 ? 0x1p-8 : 0x1p-21;
}

void expect_exactly_n_kept(const BinarizedWeight& weight) {
  for (int64_t first = 0; first < weight.cols(); first += weight.nm.group) {
    const int64_t width = std::min<int64_t>(weight.nm.group, weight.cols() - first);
    const at::Tensor kept = weight.symbols.narrow(1, first, width).ne(0).sum(1);
    EXPECT_TRUE(kept.eq(std::min<int64_t>(weight.nm.keep, width)).all().item<bool>())
        << "group at column " << first;
  }
}

class LatentWeightTest : public test::InBothProducts {};
STBLLM_INSTANTIATE_PRODUCTS(LatentWeightTest);

TEST_P(LatentWeightTest, StartsAsTheQuantizedWeight) {
  for (const auto& [nm, levels] : kCodes) {
    Layer layer = make_layer(nm, levels);
    ASSERT_TRUE(layer.weight.has_outliers());
    const at::Tensor expected = layer.weight.to_dense(), symbols = layer.weight.symbols;
    LatentWeight latent(layer.weight, layer.original, /*train_codes=*/true);
    EXPECT_LE((latent.dense().detach().to(at::kFloat) - expected)
                  .abs()
                  .div(expected.abs().clamp_min(1e-6))
                  .max()
                  .item<double>(),
              rounding_of(latent))
        << nm.str() << " " << levels;
    EXPECT_EQ(latent.write_back(), 0);
    EXPECT_TRUE(layer.weight.symbols.equal(symbols));
    EXPECT_TRUE(layer.weight.to_dense().equal(expected)) << nm.str() << " " << levels;
  }
}

/// Mean square of x W^T - y, and the smallest it can become when each row's coded weights (all but the
/// columns that are stored exactly) are multiplied by a factor: per row the least squares of one unknown.
struct Errors {
  double now = 0, with_best_gains = 0;
  Errors(const BinarizedWeight& weight, const at::Tensor& x, const at::Tensor& y) {
    at::Tensor coded = weight.to_dense().to(at::kDouble), exact = at::zeros_like(coded);
    const at::Tensor columns = weight.outlier_columns.to(at::kLong);
    exact.index_copy_(1, columns, coded.index_select(1, columns));
    coded.index_fill_(1, columns, 0);
    const at::Tensor a = x.to(at::kDouble).mm(coded.t());
    const at::Tensor b = y.to(at::kDouble) - x.to(at::kDouble).mm(exact.t());
    now = (a - b).square().mean().item<double>();
    const at::Tensor gains = (a * b).sum(0) / a.square().sum(0);
    with_best_gains = (a * gains - b).square().mean().item<double>();
  }
};

/// 60 steps of Adam at 0.01, which rise over 8 and fall to 0, may move the logarithm of a gain by 0.01 x 26 =
/// 0.26. White inputs, in place of those that the layer was quantized for, ask for less than that, so that
/// gains alone can come close to the best; half the way is asked of them. Codes change which weights are
/// kept, which no gain can do, and must get below the best gains. All errors are those of the weights that
/// were written back, in float64: products in bfloat16 round gradients and nothing that is compared here.
TEST_P(LatentWeightTest, StepsLowerTheErrorOfItsOutputs) {
  for (const auto& [nm, levels] : kCodes) {
    for (const bool codes : {false, true}) {
      SCOPED_TRACE(fmt::format("{} with {} levels, codes {}", nm.str(), levels, codes));
      Layer layer = make_layer(nm, levels);
      const at::Tensor symbols = layer.weight.symbols.clone();
      at::manual_seed(11);
      const at::Tensor x = at::randn({256, layer.original.size(1)}), y = x.mm(layer.original.t());
      const Errors before(layer.weight, x, y);
      LatentWeight latent(layer.weight, layer.original, codes);
      for (int64_t step = 0; step < 60; ++step) {
        const at::Tensor outputs = at::linear(x.to(latent.dense().scalar_type()), latent.dense());
        (outputs.to(at::kFloat) - y).square().mean().backward();
        latent.step(decayed({0.01, codes ? 0.01 : 0.0}, step, 60));
      }
      latent.write_back();
      const Errors after(layer.weight, x, y);
      EXPECT_LT(after.now, codes ? before.with_best_gains : (before.now + before.with_best_gains) / 2);
      expect_exactly_n_kept(layer.weight);
      EXPECT_EQ(layer.weight.symbols.equal(symbols), !codes);
      EXPECT_TRUE(unpack_weight(pack_weight(layer.weight, "w")).to_dense().equal(layer.weight.to_dense()));
      // Row scales and levels are rounded to fp16 on the way, half a unit (2^-11) each.
      const at::Tensor dense = layer.weight.to_dense();
      EXPECT_LE((latent.dense().detach().to(at::kFloat) - dense).abs().max().item<double>(),
                (rounding_of(latent) + 2 * 0x1p-11) * dense.abs().max().item<double>());
    }
  }
}

TEST_P(LatentWeightTest, LeavesExactColumnsAlone) {
  Layer layer = make_layer({3, 8}, 1);
  const at::Tensor columns = layer.weight.outlier_columns.to(at::kLong),
                   before = layer.weight.to_dense().index_select(1, columns);
  LatentWeight latent(layer.weight, layer.original, /*train_codes=*/true);
  for (int64_t step = 0; step < 30; ++step) {
    latent.dense().square().sum().backward();
    latent.step({0.05, 0.05});
  }
  latent.write_back();
  EXPECT_TRUE(layer.weight.to_dense().index_select(1, columns).equal(before));
}

TEST_P(LatentWeightTest, WritesTheStateOfNowHoweverOftenItIsAsked) {
  Layer layer = make_layer({2, 4}, 3);
  LatentWeight latent(layer.weight, layer.original, /*train_codes=*/true);
  for (int64_t step = 0; step < 10; ++step) {
    latent.dense().square().sum().backward();
    latent.step({0.02, 0.02});
  }
  latent.write_back();
  const at::Tensor once = layer.weight.to_dense();
  latent.write_back();
  EXPECT_TRUE(layer.weight.to_dense().equal(once));
}

TEST_P(LatentWeightTest, DoesNotDependOnThreads) {
  std::vector<at::Tensor> results;
  for (const int threads : {1, 2}) {
    const test::Threads scope(threads);
    Layer layer = make_layer({2, 4}, 3, 96, 128);
    LatentWeight latent(layer.weight, layer.original, /*train_codes=*/true);
    for (int64_t step = 0; step < 5; ++step) {
      (latent.dense() * latent.dense().detach().add(0.01)).sum().backward();
      latent.step({0.02, 0.02});
    }
    results.push_back(latent.dense().detach().clone());
  }
  EXPECT_TRUE(results[0].equal(results[1]));
}

TEST(StochasticRounding, ChancesAreEven) {
  const at::Tensor like = at::empty({64, 48}, at::kShort);
  for (const int64_t step : {1, 2, 300}) {
    const at::Tensor chances = by_tensors::rounding_chances(static_cast<uint32_t>(step), like);
    EXPECT_GE(chances.min().item<float>(), 0);
    EXPECT_LT(chances.max().item<float>(), 1);
    // The mean of 3072 even numbers has a standard deviation of 0.0052.
    EXPECT_NEAR(chances.mean().item<double>(), 0.5, 0.02);
  }
}

TEST(StochasticRounding, StepsBelowWhatALatentResolvesAddUp) {
  const Layer layer = make_layer({2, 4}, 1);
  const LatentState state(layer.weight, layer.original, /*train_codes=*/true);
  const at::Tensor before = state.latents(), gradient = at::ones_like(state.dense);
  constexpr int kSteps = 100;
  const double rate = state.latent_step / 10;
  for (int step = 1; step <= kSteps; ++step) by_lanes::step(state, gradient, {.codes = rate}, step);
  // Gradients that do not change move a latent by about the rate: by less where a row's and a column's mean
  // squares say that its gradient is small.
  const double moved = (before - state.latents()).mean().item<double>();
  EXPECT_GT(moved, 0.8 * kSteps * rate);
  EXPECT_LT(moved, 1.05 * kSteps * rate);
}

}  // namespace
}  // namespace stbllm
