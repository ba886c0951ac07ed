#include "stbllm/base/profile.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace stbllm {
namespace {

using ::testing::ElementsAre;

std::vector<std::string> names() {
  std::vector<std::string> result;
  for (const Stage& stage : profiled_stages()) result.push_back(stage.name);
  return result;
}

TEST(Profile, ListsNestedStagesUnderTheirOuterOneWhenTheyAppearLate) {
  reset_profile();
  const auto outer = [](bool with_inner) {
    const StageTimer timer("outer");
    if (with_inner) const StageTimer inner("inner");
  };
  outer(false);
  { const StageTimer other("other"); }
  outer(true);
  EXPECT_THAT(names(), ElementsAre("outer", "outer/inner", "other"));
  EXPECT_EQ(profiled_stages()[0].calls, 2);
}

TEST(Profile, OuterStagesIncludeSecondsAndOperationsOfInnerOnes) {
  reset_profile();
  {
    const StageTimer outer("outer", 1);
    const StageTimer inner("inner", 10);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  const std::vector<Stage> stages = profiled_stages();
  ASSERT_EQ(stages.size(), 2u);
  EXPECT_EQ(stages[0].flops, 11);
  EXPECT_EQ(stages[1].flops, 10);
  EXPECT_GE(stages[1].seconds, 0.002);  // sleep_for never returns early
  EXPECT_GE(stages[0].seconds, stages[1].seconds);
}

TEST(Profile, ResetForgetsAllStages) {
  { const StageTimer timer("something"); }
  reset_profile();
  EXPECT_TRUE(profiled_stages().empty());
}

}  // namespace
}  // namespace stbllm
