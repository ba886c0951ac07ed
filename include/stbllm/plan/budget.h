#pragma once
// The plan of BudgetAllocation: each linear gets the scheme that pays most for its bytes.

#include "stbllm/plan/plan_model.h"

namespace stbllm {

/// Spends the target on the first `blocks` blocks: it offers each linear a few schemes, quantized without
/// refit and descent on what a few of the windows give it in the dense model. The error of an offer is that
/// of its block's outputs, relative to each token's norm, with that linear alone replaced: measured for one
/// scheme, scaled by the relative output errors of the others; late blocks count more. Processes divide the
/// linears.
Plan plan_by_budget(const PlanRequest& request);

/// Throws Error(kUsage) where the budget of `recipe` could not even pay for the smallest scheme of every
/// linear. Does nothing for other allocations.
void check_budget(const ModelSpec& spec, const Recipe& recipe, int64_t blocks);

/// Bytes that the linears of the first `blocks` blocks may take.
int64_t budget_bytes(const ModelSpec& spec, const BudgetAllocation& budget, int64_t blocks);

/// The lean method without what a trial has no time for.
LeanMethod trial_method(const Method& method);

/// What the plan does beside its statistics.
struct BudgetWork {
  int64_t schemes_per_linear;  ///< quantized by the trial method
  int64_t tokens_per_block;    ///< forward passes of a block, where a model has so many tokens of calibration
};
BudgetWork budget_work(const ModelSpec& spec);

}  // namespace stbllm
