#include "stbllm/run/time_budget.h"

#include <algorithm>

namespace stbllm {
namespace {

/// With fewer windows than this training does more harm than good.
constexpr double kFewestWindows = 64;
/// What codes learn by heart does not help: after so many epochs the held-out divergence rises.
constexpr int kMostEpochs = 4;
/// Share of the time that is planned: estimates err by as much.
constexpr double kPlanned = 0.95;

}  // namespace

TrainingChoice choose_training(double seconds, const Estimate& untrained, int64_t calibration,
                               int64_t available) {
  const double left = kPlanned * seconds - untrained.seconds;
  const auto own = static_cast<double>(calibration), text = own + static_cast<double>(available);
  const double dense = untrained.dense_window_seconds, step = untrained.distilled_window_seconds;
  // Of windows in all epochs, if the text had enough: each fresh one goes through the dense model too.
  const double once = (left + own * dense) / (step + dense);
  if (once < std::max(kFewestWindows, own)) return {};
  if (once <= text) return {.windows = static_cast<int64_t>(once - own), .epochs = 1};
  const double epochs = (left - static_cast<double>(available) * dense) / (step * text);
  return {.windows = available, .epochs = std::clamp(static_cast<int>(epochs), 1, kMostEpochs)};
}

}  // namespace stbllm
