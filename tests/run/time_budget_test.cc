#include "stbllm/run/time_budget.h"

#include <gtest/gtest.h>

namespace stbllm {
namespace {

/// A minute of linear algebra; a window takes 0.2 s through the dense model and 0.8 s in an epoch.
Estimate minute() {
  Estimate estimate;
  estimate.seconds = 60;
  estimate.dense_window_seconds = 0.2;
  estimate.distilled_window_seconds = 0.8;
  return estimate;
}

/// What a run takes that follows `choice`.
double seconds_of(const TrainingChoice& choice, int64_t calibration) {
  const auto fresh = static_cast<double>(choice.windows), all = fresh + static_cast<double>(calibration);
  return 60 + 0.2 * fresh + 0.8 * all * choice.epochs;
}

TEST(TrainingChoice, FillsTheTimeWithFreshWindows) {
  const TrainingChoice choice = choose_training(600, minute(), /*calibration=*/56, /*available=*/10000);
  EXPECT_EQ(choice.epochs, 1);
  EXPECT_LE(seconds_of(choice, 56), 600);
  EXPECT_GT(seconds_of(choice, 56), 0.93 * 600);
}

TEST(TrainingChoice, TakesMoreEpochsWhenTheTextIsUsedUp) {
  const TrainingChoice choice = choose_training(600, minute(), /*calibration=*/56, /*available=*/144);
  EXPECT_EQ(choice, (TrainingChoice{.windows = 144, .epochs = 3}));
  EXPECT_LE(seconds_of(choice, 56), 600);
}

TEST(TrainingChoice, LeavesTrainingOutWhereThereIsNoTime) {
  EXPECT_EQ(choose_training(60, minute(), 56, 10000), TrainingChoice{});
  EXPECT_EQ(choose_training(10, minute(), 56, 10000), TrainingChoice{});
  EXPECT_EQ(choose_training(100, minute(), 56, 10000), TrainingChoice{});  // too little to be of use
  EXPECT_GT(choose_training(200, minute(), 56, 10000).windows, 0);
}

}  // namespace
}  // namespace stbllm
