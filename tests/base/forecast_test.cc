#include "stbllm/base/forecast.h"

#include <gtest/gtest.h>

#include <map>

namespace stbllm {
namespace {

/// Lets a run happen whose stages take `real` seconds, and returns the largest relative error of the time
/// left + gone, over all moments from `from` of the run on.
double worst_error(const std::vector<ExpectedStage>& predicted, const std::vector<double>& real,
                   double from) {
  Forecast forecast(predicted);
  double total = 0, began = 0, worst = 0;
  for (const double seconds : real) total += seconds;
  for (size_t i = 0; i < real.size(); ++i) {
    forecast.begin(predicted[i].name, began);
    for (double fraction = 0; fraction < 1; fraction += 0.01) {
      const double time = began + fraction * real[i];
      if (time < from * total) continue;
      worst = std::max(worst, std::abs(time + forecast.left(fraction, time) - total) / total);
    }
    began += real[i];
  }
  return worst;
}

const std::vector<ExpectedStage> kStages = {
    {"prepare", 5}, {"plan", 20}, {"quantize", 100}, {"distill", 300}};

TEST(Forecast, ARightPredictionStaysRight) { EXPECT_LT(worst_error(kStages, {5, 20, 100, 300}, 0), 1e-9); }

TEST(Forecast, LearnsHowFastTheMachineIs) {
  EXPECT_LT(worst_error(kStages, {15, 60, 300, 900}, 0.1), 0.25);
  EXPECT_LT(worst_error(kStages, {2, 7, 35, 100}, 0.1), 0.25);
}

TEST(Forecast, AStageThatWasPredictedWrongCorrectsItself) {
  EXPECT_LT(worst_error({{"quantize", 100}}, {300}, 0.1), 0.25);
  EXPECT_LT(worst_error({{"quantize", 100}}, {30}, 0.1), 0.25);
}

TEST(Forecast, CountsSharesInPredictedTime) {
  Forecast forecast(kStages);
  EXPECT_EQ(forecast.done(0), 0);
  forecast.begin("quantize", 30);
  EXPECT_NEAR(forecast.done(0.5), 75.0 / 425, 1e-12);
  forecast.begin("plan", 40);  // over already
  EXPECT_NEAR(forecast.done(0.5), 75.0 / 425, 1e-12);
  EXPECT_TRUE(forecast.knows("distill"));
  EXPECT_FALSE(forecast.knows("perplexity"));
}

TEST(Forecast, StagesWithoutTimeDivideByNothing) {
  Forecast forecast({{"quantize", 0}, {"distill", 0}});
  EXPECT_GE(forecast.left(0, 0), 0);
  EXPECT_LT(forecast.left(0, 0), 1);
}

}  // namespace
}  // namespace stbllm
