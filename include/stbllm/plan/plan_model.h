#pragma once
// Which scheme each linear of a model gets, before anything is quantized.

#include "stbllm/calibrate/calibration.h"
#include "stbllm/plan/plan.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {

struct PlanRequest {
  const Checkpoint& checkpoint;
  const Decoder& decoder;          ///< of the dense model
  const Calibration& calibration;  ///< with the windows of all processes
  const Recipe& recipe;
  int64_t blocks;  ///< the first so many are going to be quantized
  const ProcessGroup& group;
};

/// As the recipe's allocation and rules say; all processes get the same plan. The allocation by outliers
/// takes `stream`, the windows of this process in front of block 0, through the whole dense model: use
/// HiddenStream::embed() afterwards.
Plan plan_model(const PlanRequest& request, HiddenStream& stream);

/// What the rules of `policy` make of a plan.
void apply_rules(Plan& plan, const ModelPolicy& policy);

/// Throws Error(kUsage) for a rule that names no linear, and where none of the first `blocks` blocks is left
/// to quantize.
void check_rules(const ModelSpec& spec, const ModelPolicy& policy, int64_t blocks);

/// Weights of the linears of the first `blocks` blocks that do not keep them.
int64_t quantized_weights(const ModelSpec& spec, const ModelPolicy& policy, int64_t blocks);

}  // namespace stbllm
