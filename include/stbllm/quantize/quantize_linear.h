#pragma once
// Weights in, structured binary weights out: the only place where the steps of the method meet.

#include <vector>

#include "stbllm/quantize/binarized_weight.h"
#include "stbllm/quantize/input_stats.h"
#include "stbllm/quantize/recipe.h"

namespace stbllm {

/// What happened while a linear was quantized, for the report.
struct LinearReport {
  double output_error = 0;    ///< relative, in the calibration H
  double holdout_error = -1;  ///< relative, in the held-out H; -1 without one
  double shrink = 0;          ///< the s that was used
  double damping = 0;         ///< of mean(diag H), after retries
  int damping_retries = 0;
  std::vector<int> salient_count;  ///< per column block
  std::vector<double> threshold;   ///< p1 per column block (regions by magnitude), empty for lean recipes
  double seconds = 0;
};

/// weight: (rows, cols) of any float type, on any device. Factors are made on the device of `stats`. There,
/// too, lean recipes whose codes are enumerated multiply and search; other recipes, first scales and the
/// solves of refit() work in host memory, where the result is. On the CPU deterministic, whatever the number
/// of threads unless the recipe is not packable(). Equations: STBLLM sections 3.2-3.4; compensation: GPTQ.
BinarizedWeight quantize_linear(const at::Tensor& weight, const InputStats& stats, const Recipe& recipe,
                                LinearReport* report = nullptr);

}  // namespace stbllm
