#pragma once
// The plan of BudgetAllocation: each linear gets the scheme that pays most for its bytes.

#include <cstdint>
#include <span>

#include "stbllm/plan/plan_model.h"

namespace stbllm {

/// Spends the target on the first `blocks` blocks: it offers each linear a few schemes, quantized without
/// refit and descent on what a few of the windows give it in the dense model. The error of an offer is that
/// of its block's outputs, relative to each token's norm, with that linear alone replaced: measured for one
/// scheme, scaled by the relative output errors of the others; late blocks count more. Processes divide the
/// linears. Linears with a rule of the recipe are offered nothing else: those that keep their weights are
/// outside the budget.
Plan plan_by_budget(const PlanRequest& request);

/// Throws Error(kUsage) where the budget of `recipe` could not even pay for the smallest scheme of every
/// linear. Does nothing for other allocations.
void check_budget(const ModelSpec& spec, const Recipe& recipe, int64_t blocks);

/// Bytes that the quantized linears of the first `blocks` blocks may take.
int64_t budget_bytes(const ModelSpec& spec, const ModelPolicy& policy, int64_t blocks);

/// A linear that is quantized once for each scheme of a list, without refit and descent.
class LinearTrial {
 public:
  /// `method` is lean. `stats` and `metrics`, which are those of the linear's tap, outlive this object.
  LinearTrial(const at::Tensor& weight, const InputStats& stats, const Method& method, LeanMetrics& metrics);
  /// `error` becomes that of its outputs, relative, in the held-out H where there is one.
  BinarizedWeight quantize(const Scheme& scheme, double& error) const;

 private:
  at::Tensor weight_;
  const InputStats& stats_;
  LeanMethod method_;
  LeanMetrics& metrics_;
  OutputError error_of_;
};

/// What the plan does, where a model has so many tokens of calibration.
struct BudgetWork {
  std::span<const Scheme> schemes;  ///< that each linear is tried with
  int64_t observed_tokens;          ///< through each block, for statistics
  int64_t judging_tokens;           ///< through each block, for the errors of its outputs
};
BudgetWork budget_work(const ModelSpec& spec);

}  // namespace stbllm
