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

struct MemoryPlan {
  int64_t peak_bytes = 0;  ///< resident memory at the worst moment of quantize_model
  bool spill = false;      ///< hidden states go to a file, to stay below options.max_memory
};

/// Stored bits per weight that the linears may have in a packed file of at most `file_bytes`. Throws
/// Error(kUsage) when what else is in the file takes all of it.
double bits_for_file(const Checkpoint& checkpoint, const Recipe& recipe, int64_t file_bytes);

/// Adds up what each stage of quantize_model holds beside what this process holds now. `calibration` has the
/// windows of this process alone. Throws Error(kUsage) when options.max_memory is too little even with hidden
/// states in a file.
MemoryPlan plan_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                       const QuantizeOptions& options);

/// Runs block 0 over a few windows and quantizes one linear of its widest tap; writes nothing. Throws as
/// plan_memory and check_windows do.
Estimate estimate_quantization(const Checkpoint& checkpoint, const Calibration& calibration,
                               const Recipe& recipe, const QuantizeOptions& options);

}  // namespace stbllm
