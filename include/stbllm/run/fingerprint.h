#pragma once
// Everything that decides the blocks of a run, so that an unfinished one is continued by its like only.

#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/calibrate/calibration.h"
#include "stbllm/run/options.h"

namespace stbllm {

/// Of rows of every linear's weight, and of all other tensors.
std::string weights_checksum(const Checkpoint& checkpoint, const ModelSpec& spec);

/// What follows the last block (distillation) is left out: it may change between runs. `calibration` has the
/// windows of all processes.
nlohmann::json fingerprint_of(const Checkpoint& checkpoint, const ModelSpec& spec, const Recipe& recipe,
                              const Calibration& calibration, const QuantizeOptions& options,
                              const ProcessGroup& group);

/// Throws Error(kMismatch) in a process that was not started as process 0 was.
void check_same_inputs(const nlohmann::json& fingerprint, const QuantizeOptions& options,
                       const ProcessGroup& group);

/// "nsamples: 16 there, 32 here" for the first field that differs; empty when none does.
std::string first_difference(const nlohmann::json& there, const nlohmann::json& here);

}  // namespace stbllm
