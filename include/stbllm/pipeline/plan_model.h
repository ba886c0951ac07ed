#pragma once
// Which recipe each linear of a model gets, before anything is quantized: the one asked for, with a code of
// its own.

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/model/decoder.h"
#include "stbllm/pipeline/quantize_block.h"
#include "stbllm/pipeline/quantize_model.h"

namespace stbllm {

/// `calibration` has the windows of all processes, `hidden` (windows, seqlen, hidden) what the embedding
/// makes of those of this one, which the allocation `outlier` uses up.
///
/// `budget` spends Recipe::target_bpw on the first `blocks`, which are those that will be quantized: it
/// offers each linear a few codes, quantized without refit and descent on what a few of the windows give it
/// in the dense model. The error of an offer is that of its block's outputs, relative to each token's norm,
/// with that linear alone replaced: measured for one code, scaled by the relative output errors of the
/// others. Processes divide the linears, and all get the same plan.
Plan plan_model(const Checkpoint& checkpoint, const Decoder& decoder, const Calibration& calibration,
                at::Tensor& hidden, int64_t blocks, const Recipe& recipe, const ProcessGroup& group);

nlohmann::json to_json(const Plan& plan);
Plan plan_from_json(const nlohmann::json& json);

/// Throws Error(kUsage) where `budget` could not even pay for the smallest code of every linear.
void check_budget(const ModelSpec& spec, const Recipe& recipe, int64_t blocks);

/// What the plan of allocation `budget` does beside its statistics.
struct BudgetWork {
  int64_t codes_per_linear;  ///< quantized without refit and descent
  int64_t tokens_per_block;  ///< forward passes of a block, where a model has so many tokens of calibration
};
BudgetWork budget_work(const ModelSpec& spec);

/// The same recipe for every linear.
Plan uniform_plan(const ModelSpec& spec, const Recipe& recipe);

/// Of the linears of the first `blocks` blocks: "2:4x3 x 182, 3:8 x 28".
std::string describe(const Plan& plan, const ModelSpec& spec, int64_t blocks);

}  // namespace stbllm
