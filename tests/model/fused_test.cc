// One pass gives what libtorch's operations give one after the other.

#include "stbllm/model/fused.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <limits>

#include "stbllm/model/decoder_block.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16};

TEST(Fused, TakesWhatNobodyDifferentiates) {
  EXPECT_FALSE(can_fuse(at::randn({2, 4})));  // gradients might be recorded
  const at::NoGradGuard no_grad;
  EXPECT_TRUE(can_fuse(at::randn({2, 4})));
  EXPECT_TRUE(can_fuse(at::randn({2, 4}).to(at::kBFloat16)));
  EXPECT_FALSE(can_fuse(at::randn({2, 4}).to(at::kDouble)));
  EXPECT_FALSE(can_fuse(at::randn({2, 4}).t()));
}

TEST(Fused, NormIsTheComposedNorm) {
  const ModelSpec spec = ModelSpec::from_config(test::tiny_llama().config);
  at::manual_seed(1);
  for (const at::ScalarType type : kTypes)
    for (const int64_t width : {64, 576, 75})
      for (const bool weighted : {true, false}) {
        at::Tensor x =
            (at::randn({2, 31, width}) * 3).to(type).slice(1, 1);  // of each sequence all but a token
        x.select(1, 7).select(1, 3).fill_(std::numeric_limits<float>::infinity());
        x.select(1, 8).select(1, 3).fill_(std::numeric_limits<float>::quiet_NaN());
        const NormWeights norm{weighted ? at::randn({width}).to(type) : at::Tensor(), {}};
        const at::Tensor composed = apply_norm(spec, norm, x);
        const at::NoGradGuard no_grad;
        const at::Tensor fused = apply_norm(spec, norm, x);
        ASSERT_EQ(fused.scalar_type(), type);
        // The mean of squares is summed in another order, half an ulp or so per step of a short tree: 2^-20
        // covers that and the roundings after it. In bfloat16 a value next to a border of rounding may then
        // fall on its other side, before the weight and after it: two ulps, and rarely so.
        const double unit = type == at::kFloat ? 0x1p-20 : 0x1p-6;
        EXPECT_TRUE(at::allclose(fused, composed, unit, /*atol=*/0, /*equal_nan=*/true))
            << width << " " << at::toString(type);
        if (type == at::kFloat) continue;
        EXPECT_GT(at::isclose(fused, composed, 0, 0, /*equal_nan=*/true).sum().item<int64_t>(),
                  x.numel() * 99 / 100);
      }
}

TEST(Fused, GateIsTheComposedGate) {
  const at::NoGradGuard no_grad;
  at::manual_seed(3);
  for (const at::ScalarType type : kTypes) {
    at::Tensor gate = at::randn({3, 11, 75}) * 5;
    gate.view(-1).slice(0, 0, 6).copy_(
        at::tensor({-200.f, 200.f, 0.f, -88.f, std::numeric_limits<float>::infinity(),
                    std::numeric_limits<float>::quiet_NaN()}));
    gate = gate.to(type);
    const at::Tensor up = at::randn(gate.sizes()).to(type);
    // Exponentials within 3 ulp on either side; in bfloat16 a value next to a border of rounding may fall on
    // its other side, twice.
    const double unit = type == at::kFloat ? 0x1p-21 : 0x1p-6;
    const at::Tensor composed = at::silu(gate) * up, fused = silu_multiply(gate, up);
    EXPECT_TRUE(at::allclose(fused, composed, unit, /*atol=*/1e-35, /*equal_nan=*/true));
    if (type == at::kFloat) continue;
    EXPECT_GT(at::isclose(fused, composed, 0, 1e-35, /*equal_nan=*/true).sum().item<int64_t>(),
              gate.numel() * 99 / 100);
  }
}

TEST(Fused, RotationIsTheComposedRotation) {
  const at::NoGradGuard no_grad;
  at::manual_seed(2);
  for (const at::ScalarType type : kTypes)
    for (const int64_t width : {64, 128, 20}) {
      const at::Tensor angle = at::outer(at::arange(7, at::kFloat), at::rand({width / 2})).repeat({1, 2});
      const at::Tensor cos = angle.cos().to(type), sin = angle.sin().to(type);
      // Heads next to each other in memory, as a projection leaves them.
      const at::Tensor x = at::randn({2, 7, 3, width}).to(type).transpose(1, 2);
      const std::vector<at::Tensor> half = x.chunk(2, -1);
      const at::Tensor composed = x * cos + at::cat({-half[1], half[0]}, -1) * sin;
      const at::Tensor rotated = rotate(x, cos, sin);
      EXPECT_EQ(rotated.strides(), x.strides());
      if (type == at::kBFloat16)
        EXPECT_TRUE(rotated.equal(composed)) << width;
      else  // a product and the sum may be one operation with one rounding
        EXPECT_TRUE(
            at::allclose(rotated, composed, /*rtol=*/0, /*atol=*/0x1p-22 * x.abs().max().item<double>()))
            << width;
    }
}

}  // namespace
}  // namespace stbllm
