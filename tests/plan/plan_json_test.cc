#include <gtest/gtest.h>

#include "stbllm/base/error.h"
#include "stbllm/plan/plan.h"
#include "support/expect_error.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

const ModelSpec kSpec = ModelSpec::from_config(test::tiny_llama().config);

nlohmann::json uniform() {
  return to_json(uniform_plan(kSpec, {.nm = {.keep = 2, .group = 4}, .levels = 3}));
}

TEST(PlanJson, IsReadAsItWasWritten) {
  nlohmann::json json = uniform();
  json["model.layers.1.mlp.up_proj"] = {{"nm", "3:8"}, {"levels", 1}, {"outlier_limit", 2}};
  EXPECT_EQ(to_json(plan_from_json(json, kSpec, kSpec.layers)), json);
}

TEST(PlanJson, RefusesDamage) {
  const std::string name = "model.layers.1.mlp.up_proj";
  const auto refuse = [&](ErrorCode code, const std::string& part, const nlohmann::json& linear) {
    nlohmann::json json = uniform();
    json[name] = linear;
    test::expect_error(code, part, [&] { plan_from_json(json, kSpec, kSpec.layers); });
    EXPECT_NO_THROW(plan_from_json(json, kSpec, 1)) << "block 1 is not asked for";
  };
  refuse(ErrorCode::kCorrupt, name + " is missing", nullptr);
  refuse(ErrorCode::kCorrupt, name, 5);
  refuse(ErrorCode::kCorrupt, "levels is missing", {{"nm", "2:4"}});
  refuse(ErrorCode::kCorrupt, "1 to 3 levels, found 4", {{"nm", "2:4"}, {"levels", 4}});
  refuse(ErrorCode::kCorrupt, "outlier_limit", {{"nm", "2:4"}, {"levels", 1}, {"outlier_limit", -1}});
  refuse(ErrorCode::kUsage, "N:M pattern '2:5'", {{"nm", "2:5"}, {"levels", 1}});
}

}  // namespace
}  // namespace stbllm
