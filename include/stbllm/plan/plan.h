#pragma once
// A plan as a value: what is decided for each linear before anything is quantized.

#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/model/model_spec.h"

namespace stbllm {

/// The same scheme for every linear.
Plan uniform_plan(const ModelSpec& spec, const Scheme& scheme);

/// {"<linear>": {"code": "3:8", "outlier_limit": 2}, ..} for each linear of the model; no "outlier_limit"
/// where the plan sets none, and "code": "keep" for a linear that keeps its weights.
nlohmann::json to_json(const Plan& plan, const ModelSpec& spec);
/// The other way round. Throws Error(kUsage) naming what is no code, a linear that the model does not have,
/// or one that is missing.
Plan plan_from_json(const nlohmann::json& json, const ModelSpec& spec);

/// Of the linears of the first `blocks` blocks: "2:4x3 x 182, 3:8 x 28".
std::string describe(const Plan& plan, const ModelSpec& spec, int64_t blocks);

/// Weights of the planned linears of the first `blocks` blocks.
int64_t planned_weights(const Plan& plan, const ModelSpec& spec, int64_t blocks);

/// Stored bits per quantized weight of the first `blocks` blocks, where `method` quantizes them; as many
/// outlier columns as the plan allows are counted.
double stored_bits(const Plan& plan, const ModelSpec& spec, const Method& method, int64_t blocks);

}  // namespace stbllm
