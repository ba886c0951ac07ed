#pragma once
// Weights in, structured binary weights out: the only place where the steps of a method meet.

#include <memory>
#include <optional>
#include <vector>

#include "stbllm/quantize/binarized_weight.h"
#include "stbllm/quantize/input_stats.h"
#include "stbllm/quantize/lean_metric.h"
#include "stbllm/quantize/method.h"
#include "stbllm/quantize/scheme.h"

namespace stbllm {

/// What the plan of a model decides for one linear.
struct LinearPlan {
  Scheme scheme;
  std::optional<int> outlier_limit = {};  ///< at most so many outlier columns, where that is less than the
                                          ///< method's limit
};

/// What happened while a linear was quantized, for the report.
struct LinearReport {
  double output_error = 0;    ///< relative, in the calibration H
  double holdout_error = -1;  ///< relative, in the held-out H; -1 without one
  double shrink = 0;          ///< of the method
  double damping = 0;         ///< of mean(diag H), after retries
  int damping_retries = 0;
  std::vector<int> salient_count;  ///< per column block; empty for the lean method
  std::vector<double> threshold;   ///< p1 per column block, where there are regions by magnitude
  double seconds = 0;
};

/// weight: (rows, cols) of any float type, on any device. Factors are made on the device of `stats`. There,
/// too, the lean method multiplies and searches where the codes of its scheme are enumerated; methods by
/// regions, first scales and the solves of refit() work in host memory, where the result is. On the CPU
/// deterministic, and the same for any number of threads unless the arithmetic is kReleased.
///
/// A `report` costs the products of the output errors; without one they are not computed.
///
/// `metrics` belong to `stats` and share work between the linears of a tap; null shares nothing and changes
/// no result. Equations: STBLLM sections 3.2-3.4; feedback: GPTQ.
BinarizedWeight quantize_linear(const at::Tensor& weight, const InputStats& stats, const Method& method,
                                const LinearPlan& plan, LinearReport* report = nullptr,
                                LeanMetrics* metrics = nullptr);

}  // namespace stbllm
