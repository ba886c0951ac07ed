#pragma once
// What quantize, plan and info are asked for on the command line: a checkpoint, a recipe and what changes it,
// and the calibration text.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "stbllm/calibrate/calibration.h"
#include "stbllm/model/model_spec.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {

struct QuantizeRequest {
  std::string checkpoint, recipe = "stbllm-2bit", nm, effort = "default";
  std::vector<std::string> calib, fields, codes, keeps;
  int64_t samples = 0, distill_samples = -1, seqlen = 0;  ///< until given: as the effort says
  double target_bits = 0;                                 ///< 0: none
  int64_t target_size = 0;
  int64_t text_windows = 0;  ///< of text that the model writes, at least; 0: as many as are used
  uint64_t seed = 0;
};

void add_checkpoint(CLI::App& command, QuantizeRequest& request);
void add_recipe_options(CLI::App& command, QuantizeRequest& request);
void add_calibration_options(CLI::App& command, QuantizeRequest& request);
void add_training_options(CLI::App& command, QuantizeRequest& request);

/// The recipe with what the command line changes of it; what the effort decides comes into `request`. Throws
/// Error(kUsage).
Recipe assemble_recipe(QuantizeRequest& request);

/// The calibration windows, of the first known text that is there where none was named. What the model writes
/// itself (--calib self) is kept in `directory`.
Calibration read_calibration(const QuantizeRequest& request, const Checkpoint& checkpoint,
                             const ModelSpec& spec, const Recipe& recipe,
                             const std::filesystem::path& directory);

}  // namespace stbllm
