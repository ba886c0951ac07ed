// A recipe. What is accepted must survive being written and read again.

#include "fuzz/fuzz_target.h"
#include "stbllm/recipe/recipe.h"

STBLLM_FUZZ_TARGET(recipe) {
  const auto path = stbllm::fuzz::file_of(bytes, "recipe.json");
  stbllm::fuzz::allow_error([&] {
    const auto recipe = stbllm::Recipe::load(path.string());
    stbllm::Recipe::from_json(recipe.to_json());
  });
}
