#pragma once
// Presets with a part replaced.

#include <string>

#include "stbllm/recipe/recipe.h"

namespace stbllm::test {

inline Scheme& scheme_of(Recipe& recipe) {
  return std::get<PatternAllocation>(recipe.model.allocation).scheme;
}
inline const Scheme& scheme_of(const Recipe& recipe) {
  return std::get<PatternAllocation>(recipe.model.allocation).scheme;
}
inline LeanMethod& lean_of(Recipe& recipe) { return std::get<LeanMethod>(recipe.method); }

inline Recipe with_scheme(const std::string& preset, const Scheme& scheme) {
  Recipe recipe = Recipe::load(preset);
  scheme_of(recipe) = scheme;
  return recipe;
}

inline Recipe with_budget(const std::string& preset, double target_bpw) {
  Recipe recipe = Recipe::load(preset);
  recipe.model.allocation = BudgetAllocation{.target_bpw = target_bpw};
  return recipe;
}

}  // namespace stbllm::test
