#include "stbllm/quantize/round_rows.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "stbllm/base/error.h"
#include "support/expect_error.h"
#include "support/threads.h"

namespace stbllm {
namespace {

constexpr int64_t kBlock = 64;

at::Tensor dense(const RoundedRows& rows, int64_t block) {
  const at::Tensor scales = rows.scales.to(at::kFloat).repeat_interleave(block, 1);
  return rows.integers.to(at::kFloat) * scales.narrow(1, 0, rows.integers.size(1));
}

/// H of inputs that lie near a few directions and have a few large columns, as those of a head do.
at::Tensor uneven_hessian(int64_t cols) {
  const at::Tensor few = at::randn({1000, 8}).mm(at::randn({8, cols}));
  at::Tensor x = few + 0.3 * at::randn({1000, cols});
  x.narrow(1, 5, 3).mul_(6);
  return x.t().mm(x) * (2.0 / 1000);
}

double error_under(const at::Tensor& hessian, const at::Tensor& difference) {
  return difference.mm(hessian).mul_(difference).sum().item<double>();
}

TEST(RoundRows, ErrLessInTheOutputsThanRowsThatAreRoundedByThemselves) {
  at::manual_seed(31);
  const at::Tensor table = at::randn({300, 200}) * 0.1, hessian = uneven_hessian(200);
  const at::Tensor aware = dense(round_rows(table, 4, kBlock, hessian, "head"), kBlock),
                   alone = dense(round_rows(table, 4, kBlock, at::eye(200), "head"), kBlock);
  // On the head of SmolLM2-135M it is a seventh.
  EXPECT_LT(error_under(hessian, aware - table), 0.5 * error_under(hessian, alone - table));
  // By itself a normal row at 4 bits under a scale for 64 columns has a relative error of 0.82 %.
  EXPECT_LT(error_under(at::eye(200), alone - table), 0.009 * table.square().sum().item<double>());
}

TEST(RoundRows, WhatIntegersCanSayComesBack) {
  at::manual_seed(32);
  at::Tensor integers = at::randint(-8, 8, {40, 130}, at::kFloat);
  integers.select(1, 0).fill_(-8);  // the largest of each block, so that the scale is found
  integers.select(1, 64).fill_(-8);
  integers.select(1, 128).fill_(-8);
  integers.narrow(0, 7, 1).narrow(1, 64, 64).zero_();
  const at::Tensor table = integers * 0.25;
  EXPECT_TRUE(at::equal(dense(round_rows(table, 4, kBlock, at::eye(130), "head"), kBlock), table));
}

TEST(RoundRows, AreTheSameForAnyNumberOfThreads) {
  at::manual_seed(33);
  const at::Tensor table = at::randn({5000, 96}), hessian = uneven_hessian(96);
  const auto rounded = [&](int threads) {
    const test::Threads scope(threads);
    return round_rows(table, 4, kBlock, hessian, "head");
  };
  const RoundedRows one = rounded(1), three = rounded(3);
  EXPECT_TRUE(at::equal(one.integers, three.integers));
  EXPECT_TRUE(at::equal(one.scales, three.scales));
}

TEST(RoundRows, RefuseWeightsThatFp16ScalesCannotReach) {
  for (const double bad : {double{NAN}, double{INFINITY}, 1e6}) {
    at::Tensor table = at::ones({6, 70});
    table[4][69] = bad;
    test::expect_error(ErrorCode::kUnsupported, "head: rows 0 to 5",
                       [&] { round_rows(table, 4, kBlock, at::eye(70), "head"); });
  }
}

}  // namespace
}  // namespace stbllm
