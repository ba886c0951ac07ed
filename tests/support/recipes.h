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

/// Targets that make up for nothing leave something to learn, even on few windows of a tiny model.
inline void start_plainly(Recipe& recipe) {
  LeanMethod& lean = lean_of(recipe);
  lean.sequential = false;
  lean.asymmetry = lean.residual = 0;
}

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
