// One pass gives what libtorch's operations give one after the other.

#include "stbllm/model/fused.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <vector>

#include "stbllm/model/decoder_block.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16};

TEST(Fused, TakesNeighboursOnTheHost) {
  EXPECT_TRUE(can_fuse(at::randn({2, 4})));
  EXPECT_TRUE(can_fuse(at::randn({2, 4}).to(at::kBFloat16)));
  EXPECT_FALSE(can_fuse(at::randn({2, 4}).to(at::kDouble)));
  EXPECT_FALSE(can_fuse(at::randn({2, 4}).t()));
}

at::Tensor composed_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.scalar_type() == at::kBFloat16 ? x.to(at::kFloat) : x;
  const at::Tensor normalized =
      (wide * at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + eps)).to(x.scalar_type());
  return weight.defined() ? normalized * weight : normalized;
}

at::Tensor composed_rotation(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const std::vector<at::Tensor> half = x.chunk(2, -1);
  return x * cos + at::cat({-half[1], half[0]}, -1) * sin;
}

/// Checks that the gradients of `fused` for `inputs`, in their own dtype, are those of `composed` in double
/// precision, for a loss that is a random sum of the outputs. `unit` times the largest gradient is the
/// rounding of one.
void expect_gradients(const std::function<at::Tensor(const std::vector<at::Tensor>&)>& fused,
                      const std::function<at::Tensor(const std::vector<at::Tensor>&)>& composed,
                      const std::vector<at::Tensor>& inputs, double unit) {
  std::vector<at::Tensor> own, wide;
  for (const at::Tensor& input : inputs) {
    own.push_back(input.detach().clone().set_requires_grad(true));
    wide.push_back(input.to(at::kDouble).set_requires_grad(true));
  }
  const at::Tensor y = fused(own), y_wide = composed(wide), slopes = at::randn(y.sizes()).to(y.scalar_type());
  y.backward(slopes);
  y_wide.backward(slopes.to(at::kDouble));
  for (size_t i = 0; i < inputs.size(); ++i) {
    ASSERT_EQ(own[i].grad().scalar_type(), inputs[i].scalar_type());
    const at::Tensor expected = wide[i].grad();
    EXPECT_LT((own[i].grad().to(at::kDouble) - expected).abs().max().item<double>(),
              unit * expected.abs().max().item<double>())
        << "input " << i << " of " << at::toString(inputs[i].scalar_type());
  }
}

/// A few roundings of each type.
double unit_of(at::ScalarType type) { return type == at::kFloat ? 0x1p-19 : 0x1p-6; }

TEST(Fused, GradientsAreTheComposedOnes) {
  at::manual_seed(5);
  for (const at::ScalarType type : kTypes) {
    for (const int64_t width : {64, 75})
      expect_gradients([](const auto& in) { return rms_norm(in[0], in[1], 1e-5); },
                       [](const auto& in) { return composed_norm(in[0], in[1], 1e-5); },
                       {(at::randn({2, 71, width}) * 3).to(type), at::randn({width}).to(type)},
                       unit_of(type));
    expect_gradients([](const auto& in) { return silu_multiply(in[0], in[1]); },
                     [](const auto& in) { return at::silu(in[0]) * in[1]; },
                     {(at::randn({3, 11, 75}) * 5).to(type), at::randn({3, 11, 75}).to(type)}, unit_of(type));
    const at::Tensor angle = at::outer(at::arange(7, at::kFloat), at::rand({10})).repeat({1, 2}),
                     cos = angle.cos().to(type), sin = angle.sin().to(type);
    expect_gradients([&](const auto& in) { return rotate(in[0].transpose(1, 2), cos, sin); },
                     [&](const auto& in) {
                       return composed_rotation(in[0].transpose(1, 2), cos.to(at::kDouble),
                                                sin.to(at::kDouble));
                     },
                     {at::randn({2, 7, 3, 20}).to(type)}, unit_of(type));
  }
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
        const at::Tensor composed = composed_norm(x, norm.weight, spec.norm_eps),
                         fused = apply_norm(spec, norm, x);
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

TEST(Fused, LayerNormIsThatOfLibtorch) {
  at::manual_seed(2);
  const c10::InferenceMode inference;
  for (const at::ScalarType type : kTypes)
    for (const int64_t width : {64, 768, 75})
      for (const bool affine : {true, false}) {
        at::Tensor x = (at::randn({2, 31, width}) * 3 + 1).to(type).slice(1, 1);
        x.select(1, 8).select(1, 3).fill_(std::numeric_limits<float>::quiet_NaN());
        at::Tensor weight, bias;
        if (affine) weight = at::randn({width}).to(type), bias = at::randn({width}).to(type);
        const at::Tensor expected = at::layer_norm(x, {width}, weight, bias, 1e-5),
                         fused = layer_norm(x, weight, bias, 1e-5);
        ASSERT_EQ(fused.scalar_type(), type);
        // Sums in another order, of numbers that weight and bias bring to at most about 16. In bfloat16 a
        // value next to a border of rounding may fall on its other side.
        const double unit = type == at::kFloat ? 0x1p-20 : 0x1p-7;
        EXPECT_TRUE(at::allclose(fused, expected, unit, /*atol=*/0x1p-18, /*equal_nan=*/true))
            << width << " " << at::toString(type);
        if (type == at::kFloat) continue;
        EXPECT_GT(at::isclose(fused, expected, 0, 0, /*equal_nan=*/true).sum().item<int64_t>(),
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

TEST(Fused, DivergenceIsTheComposedDivergence) {
  at::manual_seed(4);
  for (const at::ScalarType type : kTypes)
    for (const int64_t vocab : {16, 75, 4099}) {
      // Logits of one model are about as large as those of another, and differ by about their spread.
      const at::Tensor teacher = (at::randn({9, vocab}) * 4).to(type),
                       student = (at::randn({9, vocab}) * 4).to(type);
      const at::Tensor log_p = at::log_softmax(teacher.to(at::kFloat), -1),
                       log_q = at::log_softmax(student.to(at::kFloat), -1),
                       composed = (log_p.exp() * (log_p - log_q)).sum(-1),
                       slopes = (log_q.exp() - log_p.exp()).to(type);
      at::Tensor fused_slopes;
      const at::Tensor fused = softmax_divergence(teacher, student, &fused_slopes);
      // Some hundred additions of float32 in another order.
      EXPECT_TRUE(at::allclose(fused, composed, /*rtol=*/1e-5, /*atol=*/1e-6)) << vocab;
      EXPECT_TRUE(at::equal(softmax_divergence(teacher, student, nullptr), fused));
      ASSERT_EQ(fused_slopes.scalar_type(), type);
      // A difference of probabilities of at most 1, each within some units of float32; in bfloat16 a value
      // next to a border of rounding may fall on its other side.
      EXPECT_TRUE(at::allclose(fused_slopes, slopes, type == at::kFloat ? 1e-5 : 0x1p-7, /*atol=*/1e-6))
          << vocab;
      // A model has no divergence from itself, and no gradient but for the rounding of a product.
      EXPECT_LT(softmax_divergence(teacher, teacher, &fused_slopes).abs().max().item<float>(), 1e-6f);
      EXPECT_LT(fused_slopes.abs().max().item<float>(), 0x1p-24f);
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
      const at::Tensor composed = composed_rotation(x, cos, sin);
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
