#pragma once
// A plan as a value: what is decided for each linear before anything is quantized.

#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/model/model_spec.h"

namespace stbllm {

/// The same scheme for every linear.
Plan uniform_plan(const ModelSpec& spec, const Scheme& scheme);

/// {"<linear>": {"nm": "3:8", "levels": 1, "outlier_limit": 2}, ..}; no "outlier_limit" where the plan sets
/// none.
nlohmann::json to_json(const Plan& plan);
Plan plan_from_json(const nlohmann::json& json);

/// Of the linears of the first `blocks` blocks: "2:4x3 x 182, 3:8 x 28".
std::string describe(const Plan& plan, const ModelSpec& spec, int64_t blocks);

}  // namespace stbllm
