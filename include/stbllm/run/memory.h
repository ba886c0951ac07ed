#pragma once
// How much memory a quantization is going to take.

#include <cstdint>

#include "stbllm/calibrate/calibration.h"
#include "stbllm/run/options.h"

namespace stbllm {

struct MemoryPlan {
  int64_t peak_bytes = 0;  ///< resident memory at the worst moment of quantize_model
  bool spill = false;      ///< hidden states go to a file, to stay below `limit`
  int64_t limit = 0;       ///< options.max_memory, or without it what the machine has
};

/// Bytes of memory that this machine has or a container allows.
int64_t machine_memory();

/// Adds up what each stage of quantize_model holds beside what this process holds now. `calibration` has the
/// windows of this process alone. Throws
/// Error(kUsage) when options.max_memory is too little even with hidden states in a file.
MemoryPlan plan_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                       const QuantizeOptions& options, int64_t machine = machine_memory());
/// The same for a run that begins now: throws Error(kOutOfMemory) when `machine` is too little.
MemoryPlan require_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                          const QuantizeOptions& options, int64_t machine = machine_memory());

}  // namespace stbllm
