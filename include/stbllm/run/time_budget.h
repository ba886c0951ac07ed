#pragma once
// How much training fits into a time.

#include <cstdint>
#include <nlohmann/json.hpp>

#include "stbllm/run/estimate.h"

namespace stbllm {

/// Windows that distillation sees beside those of the calibration, and its epochs over both; no epochs: there
/// is no time to train.
struct TrainingChoice {
  int64_t windows = 0;
  int epochs = 0;

  bool operator==(const TrainingChoice&) const = default;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TrainingChoice, windows, epochs)

/// What a run of about `seconds` has time for. `untrained` is the estimate of the same run without training,
/// `calibration` the windows of its calibration that train too, `available` those that the text has beside
/// them. Fresh windows come before a second epoch.
TrainingChoice choose_training(double seconds, const Estimate& untrained, int64_t calibration,
                               int64_t available);

}  // namespace stbllm
