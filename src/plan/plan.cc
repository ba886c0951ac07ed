#include "stbllm/plan/plan.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"
#include "stbllm/calibrate/pack_weight.h"

namespace stbllm {

Plan uniform_plan(const ModelSpec& spec, const Scheme& scheme) {
  Plan plan;
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) plan[linear.name] = {.scheme = scheme};
  return plan;
}

nlohmann::json to_json(const Plan& plan, const ModelSpec& spec) {
  nlohmann::json json = nlohmann::json::object();
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) {
      const auto own = plan.find(linear.name);
      json[linear.name] = {
          {"code", code_text(own == plan.end() ? std::nullopt : std::optional(own->second.scheme))}};
      if (own != plan.end() && own->second.outlier_limit)
        json[linear.name]["outlier_limit"] = *own->second.outlier_limit;
    }
  return json;
}

Plan plan_from_json(const nlohmann::json& json, const ModelSpec& spec) {
  if (!json.is_object()) fail(ErrorCode::kUsage, "a plan is an object of linear: {{\"code\": ..}}");
  const Plan all = uniform_plan(spec, {});
  for (const auto& [name, entry] : json.items())
    if (!all.contains(name))
      fail(ErrorCode::kUsage, "the plan names {}, which the model does not have", name);
  Plan plan;
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) {
      const auto entry = json.find(linear.name);
      if (entry == json.end())
        fail(ErrorCode::kUsage,
             "the plan says nothing about {}; add it, with \"code\": \"keep\" to leave it as it is",
             linear.name);
      const auto code = entry->is_object() ? entry->find("code") : entry->end();
      if (code == entry->end() || !code->is_string())
        fail(ErrorCode::kUsage, "the plan of {}: expected {{\"code\": \"3:8\"}}, found {}", linear.name,
             entry->dump());
      for (const auto& [field, value] : entry->items())
        if (field != "code" && field != "outlier_limit")
          fail(ErrorCode::kUsage, "the plan of {}: unknown field '{}'; there are code and outlier_limit",
               linear.name, field);
      const std::optional<Scheme> scheme = [&] {
        try {
          return parse_code(code->get_ref<const std::string&>());
        } catch (const Error& error) {
          fail(ErrorCode::kUsage, "the plan of {}: {}", linear.name, error.what());
        }
      }();
      if (!scheme) continue;
      LinearPlan& own = plan[linear.name];
      own.scheme = *scheme;
      if (const auto limit = entry->find("outlier_limit"); limit != entry->end()) {
        const std::optional<int64_t> columns = integer_of(*limit);
        if (!columns || *columns < 0 || !std::in_range<int>(*columns))
          fail(ErrorCode::kUsage, "the plan of {}: outlier_limit is {}, expected a count of columns",
               linear.name, limit->dump());
        own.outlier_limit = static_cast<int>(*columns);
      }
    }
  return plan;
}

std::string describe(const Plan& plan, const ModelSpec& spec, int64_t blocks) {
  std::vector<Scheme> schemes;
  for (int64_t i = 0; i < blocks; ++i)
    for (const LinearSpec& linear : planned(spec.linears(i), plan))
      schemes.push_back(plan.at(linear.name).scheme);
  return describe(schemes);
}

int64_t planned_weights(const Plan& plan, const ModelSpec& spec, int64_t blocks) {
  int64_t weights = 0;
  for (int64_t i = 0; i < blocks; ++i)
    for (const LinearSpec& linear : planned(spec.linears(i), plan)) weights += linear.rows * linear.cols;
  return weights;
}

double stored_bits(const Plan& plan, const ModelSpec& spec, const Method& method, int64_t blocks) {
  const auto* lean = std::get_if<LeanMethod>(&method);
  const int limit = lean != nullptr && lean->outliers ? lean->outliers->limit : 0;
  int64_t bytes = 0;
  for (int64_t i = 0; i < blocks; ++i)
    for (const LinearSpec& linear : planned(spec.linears(i), plan)) {
      const LinearPlan& own = plan.at(linear.name);
      Layout layout = layout_of(linear, own.scheme, method);
      layout.outliers = std::min(limit, own.outlier_limit.value_or(limit));
      bytes += layout_bytes(layout);
    }
  return 8.0 * static_cast<double>(bytes) / static_cast<double>(planned_weights(plan, spec, blocks));
}

}  // namespace stbllm
