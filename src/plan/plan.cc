#include "stbllm/plan/plan.h"

namespace stbllm {

Plan uniform_plan(const ModelSpec& spec, const Scheme& scheme) {
  Plan plan;
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) plan[linear.name] = {.scheme = scheme};
  return plan;
}

nlohmann::json to_json(const Plan& plan) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, linear] : plan) {
    json[name] = {{"nm", linear.scheme.nm.str()}, {"levels", linear.scheme.levels}};
    if (linear.outlier_limit) json[name]["outlier_limit"] = *linear.outlier_limit;
  }
  return json;
}

Plan plan_from_json(const nlohmann::json& json) {
  Plan plan;
  for (const auto& [name, linear] : json.items()) {
    LinearPlan& own = plan[name];
    own.scheme = {.nm = NmPattern::parse(linear.at("nm").get<std::string>()), .levels = linear.at("levels")};
    if (const auto limit = linear.find("outlier_limit"); limit != linear.end())
      own.outlier_limit = limit->get<int>();
  }
  return plan;
}

std::string describe(const Plan& plan, const ModelSpec& spec, int64_t blocks) {
  std::vector<Scheme> schemes;
  for (int64_t i = 0; i < blocks; ++i)
    for (const LinearSpec& linear : spec.linears(i)) schemes.push_back(plan.at(linear.name).scheme);
  return describe(schemes);
}

}  // namespace stbllm
