// One pass over the keys gives what the whole matrix of scores gives.

#include "stbllm/model/attention.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "support/threads.h"

namespace stbllm {
namespace {

struct Inputs {
  at::Tensor queries, keys, values;
};

/// Heads next to each other in memory, as projections leave them; keys in a cache that could hold more.
Inputs make_inputs(int64_t heads, int64_t kv_heads, int64_t tokens, int64_t first, int64_t dim,
                   at::ScalarType type) {
  at::manual_seed(tokens + first);
  const auto cached = [&] {
    return (at::randn({2, kv_heads, first + tokens + 5, dim}) * 2).to(type).slice(2, 0, first + tokens);
  };
  return {(at::randn({2, tokens, heads, dim}) * 2).to(type).transpose(1, 2), cached(), cached()};
}

/// The slow twin: the whole matrix of scores, in double precision.
at::Tensor composed(const Inputs& in, int64_t first, int64_t window) {
  const int64_t group = in.queries.size(1) / in.keys.size(1), tokens = in.queries.size(2);
  const at::Tensor queries = in.queries.to(at::kDouble),
                   keys = in.keys.to(at::kDouble).repeat_interleave(group, 1),
                   values = in.values.to(at::kDouble).repeat_interleave(group, 1);
  const at::Tensor distance =
      (at::arange(tokens) + first).unsqueeze(1) - at::arange(first + tokens).unsqueeze(0);
  at::Tensor hidden = distance < 0;
  if (window > 0) hidden = hidden.logical_or(distance >= window);
  const at::Tensor scores =
      at::matmul(queries, keys.transpose(2, 3)) / std::sqrt(static_cast<double>(in.queries.size(3)));
  const at::Tensor mixed = at::matmul(
      at::softmax(scores.masked_fill(hidden, -std::numeric_limits<double>::infinity()), -1), values);
  return mixed.transpose(1, 2).reshape({in.queries.size(0), tokens, -1});
}

TEST(Attention, IsSoftmaxAttention) {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const auto& [heads, kv_heads, dim] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
             {9, 3, 64}, {4, 2, 128}, {2, 2, 80}, {4, 1, 8}, {3, 3, 20}, {8, 1, 64}, {14, 2, 16}})
      for (const auto& [tokens, first] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 0}, {1, 70}, {1, 300}, {2, 0}, {12, 3}, {5, 63}, {64, 0}, {65, 64}, {131, 0}, {200, 17}})
        for (const int64_t window : {0, 1, 7, 64, 100}) {
          const Inputs in = make_inputs(heads, kv_heads, tokens, first, dim, type);
          const at::Tensor mixed = causal_attention(in.queries, in.keys, in.values, first, window),
                           exact = composed(in, first, window);
          ASSERT_EQ(mixed.scalar_type(), type);
          ASSERT_EQ(mixed.sizes(), exact.sizes());
          // Scores of up to 30 carry float32 rounding of about 2^-20 into their exponentials; the result is a
          // mean of values up to 10. In bfloat16 it is rounded to 8 bits.
          EXPECT_TRUE(at::allclose(mixed.to(at::kDouble), exact, /*rtol=*/type == at::kFloat ? 0 : 0x1p-8,
                                   /*atol=*/0x1p-16))
              << heads << " heads of " << dim << ", " << tokens << " tokens at " << first << ", window "
              << window << ": " << (mixed.to(at::kDouble) - exact).abs().max().item<double>();
        }
}

TEST(Attention, HandsBackTheGradientsOfSoftmaxAttention) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16})
    for (const auto& [heads, kv_heads, dim] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{{9, 3, 64}, {2, 2, 80}, {3, 1, 20}})
      for (const int64_t tokens : {1, 7, 131, 300})
        for (const int64_t window : {0, 1, 100}) {
          const Inputs in = make_inputs(heads, kv_heads, tokens, 0, dim, type);
          Inputs own, exact;
          for (at::Tensor Inputs::*part : {&Inputs::queries, &Inputs::keys, &Inputs::values}) {
            own.*part = (in.*part).detach().requires_grad_();
            exact.*part = (in.*part).to(at::kDouble).requires_grad_();
          }
          const at::Tensor mixed = causal_attention(own.queries, own.keys, own.values, 0, window),
                           slopes = at::randn(mixed.sizes()).to(type);
          mixed.backward(slopes);
          composed(exact, 0, window).backward(slopes.to(at::kDouble));
          for (at::Tensor Inputs::*part : {&Inputs::queries, &Inputs::keys, &Inputs::values}) {
            const at::Tensor found = (own.*part).grad(), expected = (exact.*part).grad();
            ASSERT_EQ(found.scalar_type(), type);
            // Of the largest gradient: float32 as above; in bfloat16 a probability, a product with the values
            // and the result are each rounded to 8 bits, the first two in sums of many.
            const double largest = std::max(1e-3, expected.abs().max().item<double>());
            EXPECT_LT((found.to(at::kDouble) - expected).abs().max().item<double>(),
                      (type == at::kFloat ? 0x1p-16 : 0x1p-6) * largest)
                << heads << " heads of " << dim << ", " << tokens << " tokens, window " << window;
          }
        }
}

TEST(Attention, StandsScoresOfAnySize) {
  const at::NoGradGuard no_grad;
  Inputs in = make_inputs(2, 1, 100, 0, 16, at::kFloat);
  in.queries = in.queries * 200;
  const Inputs last{in.queries.slice(2, 99), in.keys, in.values};
  for (const auto& [inputs, first] : {std::pair(in, 0), std::pair(last, 99)}) {
    const at::Tensor mixed = causal_attention(inputs.queries, in.keys, in.values, first, 0);
    EXPECT_TRUE(at::allclose(mixed.to(at::kDouble), composed(inputs, first, 0), 0,
                             /*atol=*/0.05));  // scores of 1e4, 2^-10 apart
    EXPECT_TRUE(mixed.isfinite().all().item<bool>());
  }
}

TEST(Attention, ShowsAFaultyKeyOnlyToThoseWhoSeeIt) {
  const at::NoGradGuard no_grad;
  const Inputs in = make_inputs(2, 2, 90, 0, 16, at::kBFloat16);
  in.keys.select(2, 70).fill_(std::numeric_limits<float>::quiet_NaN());
  const at::Tensor finite = causal_attention(in.queries, in.keys, in.values, 0, 0).isfinite().all(-1);
  EXPECT_TRUE(finite.slice(1, 0, 70).all().item<bool>());
  EXPECT_FALSE(finite.slice(1, 70).any().item<bool>());
  for (const int64_t seen : {70, 90}) {  // by one query
    const at::Tensor alone = causal_attention(in.queries.slice(2, seen - 1, seen), in.keys.slice(2, 0, seen),
                                              in.values.slice(2, 0, seen), seen - 1, 0);
    EXPECT_EQ(alone.isfinite().all().item<bool>(), seen == 70);
    EXPECT_EQ(alone.isfinite().any().item<bool>(), seen == 70);
  }
}

TEST(Attention, GivesTheSameBytesForAnyNumberOfThreads) {
  const at::NoGradGuard no_grad;
  for (const int64_t tokens : {1, 300}) {
    std::vector<at::Tensor> results;
    for (const int threads : {1, 3}) {
      const test::Threads scope(threads);
      const Inputs in = make_inputs(9, 3, tokens, 300, 64, at::kBFloat16);
      results.push_back(causal_attention(in.queries, in.keys, in.values, 300, 0));
    }
    EXPECT_TRUE(results[0].equal(results[1])) << tokens;
  }
}

}  // namespace
}  // namespace stbllm
