#pragma once
// A checkpoint in, a packed file out: block by block, the inputs of each block coming from the quantized
// blocks before it.
//
// Resident at any time: one decoder block, the Hessians of its four taps, the hidden states of the
// calibration windows (bfloat16), which go to a file where they do not fit. Every finished block is a file in
// a work directory beside the output, so that a run can be continued after any interruption; the finished
// model is assembled there, verified against the quantizer's own result, and renamed into place.

#include <optional>
#include <vector>

#include "stbllm/calibrate/calibration.h"
#include "stbllm/calibrate/results.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/plan/plan.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/recipe/recipe.h"
#include "stbllm/run/options.h"

namespace stbllm {

struct QuantizeResult {
  std::vector<LinearResult> linears;
  std::vector<BlockResult> blocks;  ///< of the quantized blocks; empty unless there is a report, or training
  std::optional<DistillReport> distill;  ///< where the whole model was distilled
  double nominal_bits = 0;  ///< mean of N/M (1 + share of salient columns) over the quantized weights
  double seconds = 0;
  double verified_logits = -1;  ///< relative L2 distance of packed and dense logits; -1: nothing to verify
};

/// Throws before the first expensive step: as check_request and plan_memory, and Error(kMismatch); later
/// Error(kWriteFailed | kVerifyFailed | kInterrupted, see base/interrupt.h). Deterministic, after a resume
/// too and whatever the number of threads (trained: one or two) where base/reproducible.h was called.
///
/// Several processes, all called with the same arguments, calibrate on their part of the windows and quantize
/// their part of the linears. Process 0 alone has the work directory and writes the output; the others return
/// when their last block is done, without what is computed after that. The result is that of one process but
/// for the rounding of sums.
QuantizeResult quantize_model(const Checkpoint& checkpoint, const Calibration& calibration,
                              const Recipe& recipe, const QuantizeOptions& options,
                              const ProcessGroup& group = {});

/// The plan that quantize_model() would follow. Throws as it does. `options` says plan_only.
Plan plan_quantization(const Checkpoint& checkpoint, const Calibration& calibration, const Recipe& recipe,
                       const QuantizeOptions& options);

}  // namespace stbllm
