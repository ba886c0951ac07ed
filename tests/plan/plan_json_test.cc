#include <gtest/gtest.h>

#include "stbllm/base/error.h"
#include "stbllm/plan/plan.h"
#include "support/expect_error.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

const ModelSpec kSpec = ModelSpec::from_config(test::tiny_llama().config);
const Scheme kUniform = {.nm = {.keep = 2, .group = 4}, .levels = 3};

TEST(PlanJson, IsReadAsItWasWritten) {
  nlohmann::json json = to_json(uniform_plan(kSpec, kUniform), kSpec);
  EXPECT_EQ(json["model.layers.0.mlp.up_proj"]["code"], "2:4x3");
  json["model.layers.1.mlp.up_proj"] = {{"code", "3:8"}, {"outlier_limit", 2}};
  json["model.layers.1.mlp.down_proj"] = {{"code", "keep"}};
  const Plan plan = plan_from_json(json, kSpec);
  EXPECT_EQ(to_json(plan, kSpec), json);
  EXPECT_FALSE(plan.contains("model.layers.1.mlp.down_proj"));
}

TEST(PlanJson, RefusesWhatSaysNoCode) {
  const std::string name = "model.layers.1.mlp.up_proj";
  const auto refuse = [&](const std::string& part, const nlohmann::json& linear) {
    nlohmann::json json = to_json(uniform_plan(kSpec, kUniform), kSpec);
    json[name] = linear;
    test::expect_error(ErrorCode::kUsage, part, [&] { plan_from_json(json, kSpec); });
  };
  refuse("the plan of " + name, nullptr);
  refuse("the plan of " + name, 5);
  refuse("the plan of " + name, {{"outlier_limit", 1}});
  refuse("code '2:4x4'", {{"code", "2:4x4"}});
  refuse("N:M pattern '2:5'", {{"code", "2:5"}});
  refuse("outlier_limit is -1", {{"code", "2:4"}, {"outlier_limit", -1}});
  refuse("outlier_limit is 1e+99", {{"code", "2:4"}, {"outlier_limit", 1e99}});
}

TEST(PlanJson, NamesEveryLinearAndNoOther) {
  nlohmann::json json = to_json(uniform_plan(kSpec, kUniform), kSpec);
  json["lm_head"] = {{"code", "2:4"}};
  test::expect_error(ErrorCode::kUsage, "names lm_head", [&] { plan_from_json(json, kSpec); });
  json.erase("lm_head");
  json.erase("model.layers.0.self_attn.q_proj");
  test::expect_error(ErrorCode::kUsage, "nothing about model.layers.0.self_attn.q_proj",
                     [&] { plan_from_json(json, kSpec); });
  test::expect_error(ErrorCode::kUsage, "a plan is an object", [&] { plan_from_json(5, kSpec); });
}

TEST(StoredBits, CountAllPlanesOfPlannedLinears) {
  // 2:4 with three levels takes 8 bits for four weights. 64 columns are less than a column block and have one
  // scale of 4 bits; a row scale has 16 bits; an outlier column one fp16 for each row.
  const Method method = LeanMethod{.outliers = OutlierColumns{.share = 0.02, .limit = 2}};
  Plan plan;
  plan["model.layers.0.self_attn.q_proj"] = {.scheme = kUniform, .outlier_limit = 1};
  EXPECT_EQ(planned_weights(plan, kSpec, kSpec.layers), 64 * 64);
  const double with_one = stored_bits(plan, kSpec, method, kSpec.layers);
  plan["model.layers.0.self_attn.q_proj"].outlier_limit = 0;
  const double without = stored_bits(plan, kSpec, method, kSpec.layers);
  EXPECT_GE(without, 2 + (4 + 16) / 64.0);
  EXPECT_LT(without, 2 + (4 + 16) / 64.0 + 0.15);    // levels, and rows that end at whole bytes
  EXPECT_NEAR(with_one - without, 16 / 64.0, 0.01);  // and the column's number
}

}  // namespace
}  // namespace stbllm
