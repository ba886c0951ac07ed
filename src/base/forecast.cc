#include "stbllm/base/forecast.h"

#include <algorithm>
#include <utility>

namespace stbllm {
namespace {

/// A prediction counts like a measurement of so large a part of what it speaks of. A stage begins with work
/// that it does once, so that the first of its measurements say less.
constexpr double kTrustInRun = 0.01, kTrustInStage = 0.05;
/// Below any stage that takes time, so that nothing is divided by zero.
constexpr double kLeastSeconds = 1e-3;

}  // namespace

Forecast::Forecast(std::vector<ExpectedStage> stages) : stages_(std::move(stages)) {
  for (ExpectedStage& stage : stages_) predicted_ += stage.seconds = std::max(stage.seconds, kLeastSeconds);
}

bool Forecast::knows(std::string_view stage) const {
  return std::ranges::find(stages_, stage, &ExpectedStage::name) != stages_.end();
}

void Forecast::begin(std::string_view stage, double time) {
  const auto found = std::ranges::find(stages_, stage, &ExpectedStage::name);
  if (found == stages_.end() || found <= stages_.begin() + static_cast<std::ptrdiff_t>(current_)) return;
  current_ = static_cast<size_t>(found - stages_.begin());
  began_ = time;
}

double Forecast::before() const {
  double seconds = 0;
  for (size_t i = 0; i < current_; ++i) seconds += stages_[i].seconds;
  return seconds;
}

double Forecast::done(double fraction) const {
  return (before() + fraction * stages_[current_].seconds) / predicted_;
}

double Forecast::left(double fraction, double time) const {
  const double stage = stages_[current_].seconds, trust = kTrustInRun * predicted_;
  const double slower = (time + trust) / (predicted_ * done(fraction) + trust);
  const double stage_slower =
      (time - began_ + slower * kTrustInStage * stage) / ((fraction + kTrustInStage) * stage);
  return stage_slower * (1 - fraction) * stage + slower * (predicted_ - before() - stage);
}

}  // namespace stbllm
