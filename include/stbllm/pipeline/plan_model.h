#pragma once
// Which recipe each linear of a model gets, before anything is quantized: the one asked for, with a code of its own.

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/model/decoder.h"
#include "stbllm/pipeline/quantize_block.h"

namespace stbllm {

/// `hidden` (windows, seqlen, hidden) holds what the embedding gives, the last `holdout` windows held out; the allocation
/// `outlier` uses it up. Every process of `group` gets the same plan.
///
/// `budget` spends Recipe::target_bpw on the first `blocks`, which are those that will be quantized: it offers each linear a few
/// codes, quantized without refit and descent on what a few of the windows give it in the dense model. The error of an offer is that of its block's outputs, relative to
/// each token's norm, with that linear alone replaced: measured for one code, scaled by the relative output errors of the others.
Plan plan_model(const Checkpoint& checkpoint, const Decoder& decoder, at::Tensor& hidden, int64_t holdout, int64_t blocks, const Recipe& recipe,
                const ProcessGroup& group);

/// What the plan of allocation `budget` does beside its statistics.
struct BudgetWork {
  int64_t codes_per_linear;  ///< quantized without refit and descent
  int64_t tokens_per_block;  ///< forward passes of a block, where a model has so many tokens of calibration
};
BudgetWork budget_work(const ModelSpec& spec);

/// The same recipe for every linear.
Plan uniform_plan(const ModelSpec& spec, const Recipe& recipe);

std::string describe(const Plan& plan);

}  // namespace stbllm
