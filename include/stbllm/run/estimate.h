#pragma once
// What a quantization will take, before it is started.

#include <cstdint>
#include <vector>

#include "stbllm/base/forecast.h"
#include "stbllm/calibrate/calibration.h"
#include "stbllm/run/options.h"

namespace stbllm {

struct Estimate {
  int64_t linear_bytes = 0;  ///< planes of the quantized linears
  int64_t dense_bytes = 0;   ///< all other tensors; the header with its metadata comes on top
  bool exact = false;        ///< the bytes follow from layouts alone; else salient or outlier columns are
                             ///< extrapolated from block 0, or N varies around the target
  /// Of a run, in their order (stages.h): extrapolated from a forward pass and some linears of block 0.
  std::vector<ExpectedStage> stages;
  double seconds = 0;                   ///< of all stages
  double dense_window_seconds = 0;      ///< of `seconds`: one window through the dense model
  double distilled_window_seconds = 0;  ///< one window in one epoch of distillation, whatever the recipe
  int64_t peak_memory_bytes = 0;
};

/// Stored bits per weight that the linears may have in a packed file of at most `file_bytes`. Throws
/// Error(kUsage) when what else is in the file takes all of it.
double bits_for_file(const Checkpoint& checkpoint, const ModelPolicy& policy, int64_t file_bytes);

/// Runs block 0 over a few windows and quantizes a linear of each width; writes nothing. Throws as
/// plan_memory and check_windows do.
Estimate estimate_quantization(const Checkpoint& checkpoint, const Calibration& calibration,
                               const Recipe& recipe, const QuantizeOptions& options);

}  // namespace stbllm
