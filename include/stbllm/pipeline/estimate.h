#pragma once
// What a quantization will take, before it is started.

#include <cstdint>

#include "stbllm/pipeline/quantize_model.h"

namespace stbllm {

struct Estimate {
  int64_t linear_bytes = 0;  ///< planes of the quantized linears
  int64_t dense_bytes = 0;   ///< all other tensors; the header with its metadata comes on top
  bool exact = false;        ///< the bytes follow from layouts alone; else salient or outlier columns are
                             ///< extrapolated from one linear,
                             ///<   or N varies around the target
  double seconds = 0;        ///< extrapolated from one block's forward pass and one linear
  int64_t peak_memory_bytes = 0;
};

/// Resident memory at the worst moment of quantize_model, from what it holds then:
///   this process now + tables at both ends + hidden states + one block + the Hessians of its taps + the
///   larger of the workspace of one linear and the intermediates of one forward pass.
int64_t predict_peak_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                            const QuantizeOptions& options);

/// Runs block 0 over a few windows and quantizes one linear of its widest tap; writes nothing. Throws as
/// quantize_model does before its first expensive step, except for an output that exists.
Estimate estimate_quantization(const Checkpoint& checkpoint, const Calibration& calibration,
                               const Recipe& recipe, const QuantizeOptions& options);

}  // namespace stbllm
