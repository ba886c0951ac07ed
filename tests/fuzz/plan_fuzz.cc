// A plan, of an unfinished run or edited by hand, for a model of one block.

#include <nlohmann/json.hpp>

#include "fuzz/fuzz_target.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/plan/plan.h"

STBLLM_FUZZ_TARGET(plan) {
  static const auto spec = stbllm::ModelSpec::from_config({{"architectures", {"LlamaForCausalLM"}},
                                                           {"hidden_size", 16},
                                                           {"num_hidden_layers", 1},
                                                           {"num_attention_heads", 2},
                                                           {"intermediate_size", 16},
                                                           {"vocab_size", 8},
                                                           {"max_position_embeddings", 8}});
  stbllm::fuzz::allow_error([&] {
    const auto json = stbllm::try_parse_json(stbllm::fuzz::text_of(bytes));
    if (!json.is_object()) return;
    const auto plan = stbllm::plan_from_json(json, spec);
    stbllm::describe(plan, spec, 1);
  });
}
