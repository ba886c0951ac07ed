// Recipes as JSON: what is written is read again, and what has no meaning is refused by name.

#include "stbllm/recipe/recipe.h"

#include <gtest/gtest.h>

#include <fstream>
#include <limits>

#include "support/expect_error.h"
#include "support/recipes.h"

namespace stbllm {
namespace {

using nlohmann::json;
using test::expect_error;

/// The smallest recipe.
json lean(const json& fields = json::object()) {
  json recipe = {{"method", {{"kind", "lean"}}}};
  recipe["method"].update(fields);
  return recipe;
}

void expect_refused(const json& recipe, const std::string& message) {
  SCOPED_TRACE(recipe.dump());
  expect_error(ErrorCode::kUsage, message, [&] { Recipe::from_json(recipe); });
}

TEST(Recipe, PresetsSayAllThatTheyDo) {
  EXPECT_EQ(Recipe::preset_names().size(), 9u);
  for (const std::string& name : Recipe::preset_names()) {
    const Recipe recipe = Recipe::load(name);
    EXPECT_EQ(recipe.name, name);
    // Every field is spelled out in the file, and nothing else.
    const std::string path = STBLLM_SOURCE_DIR "/configs/" + name + ".json";
    json file = json::parse(std::ifstream(path));
    file.erase("description");
    EXPECT_EQ(recipe.to_json(), file) << name;
    EXPECT_EQ(Recipe::load(path).to_json(), file) << name;
  }
}

TEST(Recipe, ReadsWhatItWrites) {
  Recipe recipe = test::with_budget("stbllm-2bit", 1.75);
  recipe.training.tune = {.epochs = 2, .lr = 0.25, .code_lr = 0};
  test::lean_of(recipe).outliers.reset();
  test::lean_of(recipe).compensate = Compensate::kNone;
  const json written = recipe.to_json();
  EXPECT_FALSE(written["method"].contains("damping"));
  EXPECT_FALSE(written["model"].contains("nm"));
  EXPECT_TRUE(written["method"]["outliers"].is_null());
  EXPECT_EQ(Recipe::from_json(written).to_json(), written);
}

TEST(Recipe, OfSeveralRulesTheLastOneCounts) {
  json file = lean();
  file["model"]["rules"] = {{{"linears", "*.mlp.*"}, {"code", "3:8"}},
                            {{"linears", "*.1.*.down_proj"}, {"code", "keep"}},
                            {{"linears", "*.2.mlp.down_proj"}, {"code", "2:4x3"}}};
  const Recipe recipe = Recipe::from_json(file);
  EXPECT_EQ(recipe.to_json()["model"]["rules"], file["model"]["rules"]);
  const ModelPolicy& model = recipe.model;
  EXPECT_EQ(model.rule_for("layers.0.self_attn.q_proj"), nullptr);
  EXPECT_EQ(model.rule_for("layers.1.mlp.up_proj")->code, (Scheme{.nm = {3, 8}, .levels = 1}));
  EXPECT_TRUE(model.keeps("layers.1.mlp.down_proj"));
  EXPECT_EQ(model.rule_for("layers.2.mlp.down_proj")->code, (Scheme{.nm = {2, 4}, .levels = 3}));
  EXPECT_FALSE(model.keeps("layers.2.mlp.down_proj"));

  file["model"]["rules"] = {{{"linears", "*"}, {"code", "2:4x4"}}};
  expect_refused(file, "expected N:M, or N:Mx2 and N:Mx3");
  file["model"]["rules"] = {{{"linears", ""}, {"code", "keep"}}};
  expect_refused(file, "a glob over names");
  file["model"]["rules"] = {{{"linear", "*"}, {"code", "keep"}}};
  expect_refused(file, "unknown recipe field 'model.rules.linear'");
  file["model"]["rules"] = "keep";
  expect_refused(file, "expected an array");
}

TEST(Recipe, LeftOutFieldsKeepTheirDefaultsAndNullLeavesAPartOut) {
  Recipe plain = Recipe::from_json(lean());
  EXPECT_EQ(test::lean_of(plain).outliers, OutlierColumns{});
  Recipe none = Recipe::from_json(lean({{"outliers", nullptr}}));
  EXPECT_FALSE(test::lean_of(none).outliers);
  json trained = lean();
  trained["training"] = {{"distill", {{"epochs", 3}}}};
  const TrainingPolicy training = Recipe::from_json(trained).training;
  EXPECT_FALSE(training.tune);
  EXPECT_EQ(training.distill->epochs, 3);
  EXPECT_EQ(training.distill->lr, TrainingPolicy::kDefaultDistill.lr);
}

TEST(Recipe, FieldsOfTheFlatFormGetTheirNewNames) {
  for (const auto& [old_name, new_name] :
       std::vector<std::pair<const char*, const char*>>{{"nm", "model.nm"},
                                                        {"levels", "model.levels"},
                                                        {"refit", "method.refit"},
                                                        {"max_outliers", "method.outliers.limit"},
                                                        {"means", "method.arithmetic"},
                                                        {"embedding", "model.embedding"},
                                                        {"tune_epochs", "training.tune.epochs"},
                                                        {"distill_code_lr", "training.distill.code_lr"}}) {
    json recipe = lean();
    recipe[old_name] = 1;
    expect_refused(recipe, std::string("recipe field '") + old_name + "' is now '" + new_name + "'");
  }
}

TEST(Recipe, RefusesWhatHasNoEffect) {
  expect_refused(lean({{"compensate", "none"}, {"damping", 0.1}}), "'method.damping' has no effect");
  json budget = lean();
  budget["model"] = {{"allocation", "budget"}, {"target_bpw", 1.5}, {"nm", "2:4"}};
  expect_refused(budget, "'model.nm' has no effect");
  json uniform = lean();
  uniform["model"] = {{"allocation", "uniform"}, {"target_bpw", 1.5}};
  expect_refused(uniform, "'model.target_bpw' has no effect");
  // What came with a preset is ignored instead.
  const std::vector<std::string> asked_for = {"model.allocation"};
  EXPECT_TRUE(
      std::holds_alternative<BudgetAllocation>(Recipe::from_json(budget, &asked_for).model.allocation));
}

TEST(Recipe, RefusesUnknownFieldsAndValues) {
  expect_refused(json::array(), "an object");
  expect_refused(json::object(), "'method'");
  expect_refused({{"method", {{"kind", "magic"}}}}, "'lean' or 'regions'");
  expect_refused(lean({{"frobnicate", 1}}), "unknown recipe field 'method.frobnicate'");
  expect_refused(lean({{"max_salient", 3}}), "unknown recipe field 'method.max_salient'");
  expect_refused(lean({{"refit", 2.5}}), "'method.refit': the value 2.5 has the wrong type");
  expect_refused(lean({{"refit", std::numeric_limits<uint64_t>::max()}}),
                 "'method.refit': the value 18446744073709551615 has the wrong type");
  expect_refused(lean({{"refit", nullptr}}), "'method.refit'");
  expect_refused(lean({{"compensate", "all"}}), "unknown value \"all\"");
  expect_refused(lean({{"outliers", {{"limit", 0}}}}), "'method.outliers.limit'");
  expect_refused(lean({{"shrink", -1}}), "'method.shrink'");
  json recipe = lean();
  recipe["training"] = {{"tune", {{"epochs", 0}}}};
  expect_refused(recipe, "'training.tune.epochs'");
  EXPECT_THROW(Recipe::load("no-such-preset"), Error);
}

TEST(Recipe, RefusesPartsThatDoNotGoTogether) {
  json shared = lean({{"scale_bits", 16}});
  shared["model"] = {{"allocation", "uniform"}, {"nm", "2:4"}, {"levels", 3}};
  expect_refused(shared, "'method.scale_bits'");
  json regions = {{"method", {{"kind", "regions"}}}, {"training", {{"tune", json::object()}}}};
  expect_refused(regions, "'training'");
  regions["training"] = json::object();
  regions["model"] = {{"allocation", "budget"}, {"target_bpw", 2}};
  expect_refused(regions, "'model.allocation'");
}

TEST(SetField, FollowsAPathAndMakesObjects) {
  json recipe = Recipe::load("stbllm").to_json();
  set_field(recipe, "training.tune.epochs", 2);
  set_field(recipe, "method.outliers", nullptr);
  const Recipe changed = Recipe::from_json(recipe);
  EXPECT_EQ(changed.training.tune->epochs, 2);
  EXPECT_EQ(changed.training.tune->lr, TrainingPolicy::kDefaultTune.lr);
  EXPECT_FALSE(std::get<LeanMethod>(changed.method).outliers);
  expect_error(ErrorCode::kUsage, "holds a value", [&] { set_field(recipe, "name.first", 1); });
}

}  // namespace
}  // namespace stbllm
