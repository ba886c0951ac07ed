// How many weights each block keeps, against values worked by hand and against a published run.

#include "stbllm/plan/allocate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

std::vector<int> kept(const std::vector<NmPattern>& patterns, int group) {
  std::vector<int> result;
  for (const NmPattern& nm : patterns) {
    EXPECT_EQ(nm.group, group);
    result.push_back(nm.keep);
  }
  return result;
}

using Kept = std::vector<int>;

TEST(AllocateByNorm, FollowsTheEquation) {
  // a = 1/4, 1/4, 1/2: ratios a + (1 - a) / 2 = 0.625, 0.625, 0.75.
  EXPECT_EQ(kept(allocate_by_norm({4, 8}, {1, 1, 2}), 8), (Kept{5, 5, 6}));
  EXPECT_EQ(kept(allocate_by_norm({8, 16}, {1, 1, 2}), 16), (Kept{10, 10, 12}));
  // R = 1/4: ratios 0.4375, 0.4375, 0.625 of 8 are 3.5, 3.5 and 5; halves go up.
  EXPECT_EQ(kept(allocate_by_norm({2, 8}, {3, 3, 6}), 8), (Kept{4, 4, 5}));
}

TEST(AllocateByNorm, DependsOnSharesOnly) {
  EXPECT_EQ(allocate_by_norm({3, 8}, {1, 2, 5}), allocate_by_norm({3, 8}, {100, 200, 500}));
}

TEST(AllocateByNorm, ApproachesTheTargetWithManyBlocks) {
  EXPECT_EQ(allocate_by_norm({4, 8}, std::vector<double>(32, 1.0)),
            std::vector<NmPattern>(32, NmPattern{4, 8}));
}

TEST(AllocateByNorm, KeepsTheTargetWhenAllWeightsAreZero) {
  EXPECT_EQ(kept(allocate_by_norm({4, 8}, {0, 0}), 8), (Kept{4, 4}));
}

TEST(AllocateByNorm, KeepsAtMostTheWholeGroup) {
  EXPECT_EQ(kept(allocate_by_norm({4, 8}, {7}), 8), (Kept{8}));  // a = 1
}

TEST(AllocateByOutliers, FollowsTheReleasedRule) {
  // z = 0, 0.5, 2 less their mean 0.83: -0.83, -0.33, 1.17 -> -1, 0, 1 -> 2.
  EXPECT_EQ(kept(allocate_by_outliers({4, 8}, {0, 1, 4}), 8), (Kept{3, 4, 6}));
  EXPECT_EQ(kept(allocate_by_outliers({2, 4}, {0, 1, 4}), 4), (Kept{1, 2, 4}));
}

TEST(AllocateByOutliers, RoundsHalvesToEven) {
  EXPECT_EQ(kept(allocate_by_outliers({4, 8}, {3, 3, 3, 5}), 8), (Kept{4, 4, 4, 6}));  // -0.5 -> 0, 1.5 -> 2
  EXPECT_EQ(kept(allocate_by_outliers({4, 8}, {3, 5, 5, 5}), 8), (Kept{2, 4, 4, 4}));  // -1.5 -> -2, 0.5 -> 0
}

TEST(AllocateByOutliers, StaysBetweenOneAndTheWholeGroup) {
  EXPECT_EQ(kept(allocate_by_outliers({1, 4}, {3, 5, 5, 5}), 4), (Kept{1, 1, 1, 1}));
  EXPECT_EQ(kept(allocate_by_outliers({7, 8}, {3, 3, 3, 5}), 8), (Kept{7, 7, 7, 8}));
}

TEST(AllocateByOutliers, KeepsTheTargetWhereBlocksDoNotDiffer) {
  EXPECT_EQ(kept(allocate_by_outliers({4, 8}, {0.2, 0.2, 0.2}), 8), (Kept{4, 4, 4}));
  EXPECT_EQ(kept(allocate_by_outliers({4, 8}, {0.2}), 8), (Kept{4}));
}

// The outlier ratios of LLaMA-2-7B's 32 blocks and what became of them ("before" and "after adjustment"),
// from the log of a 4:8 run that the authors published: github.com/pprp/STBLLM, logs/stbllm_series/
// stbllm_wikitext2_si-structure-4:8-0.5-wrec_hessian-4mask-billm-160_main.log.
const std::vector<double> kPublishedRatios = {
    0.4209790205090775,  0.40479818156346137, 0.30860456160313104, 0.3875035696079076,  0.2518391979790722,
    0.21269062022471058, 0.2656249802347292,  0.24487045762452436, 0.2065233616013601,  0.18616167374843143,
    0.17812165571617955, 0.2158985236765807,  0.18172140566178552, 0.17278453846669567, 0.16096737718335088,
    0.13882137950837922, 0.12738272316097596, 0.11663733368710533, 0.11377779313319705, 0.1085874330194503,
    0.09938126400962394, 0.10590726229810962, 0.09423685815050195, 0.09529924145634311, 0.09761968424900826,
    0.09774321719154794, 0.09282364128784812, 0.07508282834384108, 0.07717942944462436, 0.07305392329556955,
    0.07160562307723446, 0.08433890466245345};
const Kept kPublishedPruned = {2, 2, 2, 2, 4, 4, 2, 4, 4, 4, 4, 4, 4, 4, 4, 4,
                               4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 4};

TEST(AllocateByOutliers, ReproducesThePublishedCountsOfLlama27b) {
  const std::vector<NmPattern> plan = allocate_by_outliers({4, 8}, kPublishedRatios);
  Kept pruned;
  for (const NmPattern& nm : plan) pruned.push_back(nm.group - nm.keep);
  EXPECT_EQ(pruned, kPublishedPruned);
  EXPECT_EQ(std::accumulate(pruned.begin(), pruned.end(), 0),
            122);  // 3.8 of 8: fewer than the 4 that the run is named after
}

// Random offers, some of them worse than others that are smaller.
std::vector<std::vector<Offer>> random_offers(std::mt19937& rng, int linears) {
  std::vector<std::vector<Offer>> offers(linears);
  for (auto& own : offers)
    for (int o = 0; o < 4; ++o)
      own.push_back({10 + static_cast<int64_t>(rng() % 30), static_cast<double>(rng() % 1000) / 100});
  return offers;
}

struct Outcome {
  int64_t bytes = 0;
  double error = 0;
};
Outcome outcome(const std::vector<std::vector<Offer>>& offers, const std::vector<size_t>& choice) {
  Outcome sum;
  for (size_t i = 0; i < offers.size(); ++i) {
    sum.bytes += offers[i].at(choice[i]).bytes;
    sum.error += offers[i][choice[i]].error;
  }
  return sum;
}

// The smallest error within the budget, by trying everything.
double smallest_error(const std::vector<std::vector<Offer>>& offers, int64_t budget) {
  double best = INFINITY;
  std::vector<size_t> choice(offers.size());
  for (int code = 0; code < std::pow(4, offers.size()); ++code) {
    for (size_t i = 0; i < offers.size(); ++i) choice[i] = code >> (2 * i) & 3;
    const Outcome sum = outcome(offers, choice);
    if (sum.bytes <= budget) best = std::min(best, sum.error);
  }
  return best;
}

TEST(AllocateByBudget, SpendsWhereAByteSavesMost) {
  const std::vector<std::vector<Offer>> offers = {
      {{10, 1.0}, {20, 0.9}}, {{10, 5.0}, {20, 1.0}}, {{10, 2.0}, {12, 1.9}, {30, 0.0}}};
  EXPECT_EQ(allocate_by_budget(offers, 30), (std::vector<size_t>{0, 0, 0}));
  EXPECT_EQ(allocate_by_budget(offers, 40), (std::vector<size_t>{0, 1, 0}));
  EXPECT_EQ(allocate_by_budget(offers, 60),
            (std::vector<size_t>{0, 1, 2}));  // past {12, 1.9}, above the line from 10 to 30
  EXPECT_EQ(allocate_by_budget(offers, 1000), (std::vector<size_t>{1, 1, 2}));
}

TEST(AllocateByBudget, NeverExceedsTheBudgetAndIsBestWhereItIsUsedUp) {
  std::mt19937 rng(1);
  int used_up = 0;
  for (int trial = 0; trial < 30; ++trial) {
    const auto offers = random_offers(rng, 5);
    int64_t smallest = 0;
    for (const auto& own : offers) smallest += std::ranges::min(own, {}, &Offer::bytes).bytes;
    double before = INFINITY;
    for (int64_t budget = smallest; budget < smallest + 150; budget += 3) {
      const Outcome sum = outcome(offers, allocate_by_budget(offers, budget));
      EXPECT_LE(sum.bytes, budget);
      // With nothing left over the last step was a whole one, or a later and smaller one filled a gap.
      const double best = smallest_error(offers, sum.bytes);
      EXPECT_GE(sum.error, best - 1e-9);
      used_up += std::abs(sum.error - best) < 1e-9;
      before = sum.error;
    }
    // Everything affordable: each linear has its smallest error.
    double least = 0;
    for (const auto& own : offers) least += std::ranges::min(own, {}, &Offer::error).error;
    EXPECT_NEAR(before, least, 1e-9);
  }
  EXPECT_GT(used_up, 30 * 50 / 2);  // the greedy walk meets the exhaustive search at most budgets
}

TEST(AllocateByBudget, RefusesABudgetBelowTheSmallestCodes) {
  EXPECT_THROW(allocate_by_budget({{{10, 1.0}}, {{10, 1.0}}}, 19), Error);
}

}  // namespace
}  // namespace stbllm
