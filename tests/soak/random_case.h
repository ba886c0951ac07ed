#pragma once
// A random model and a random way to quantize it, decided by one number.

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>

#include "stbllm/recipe/recipe.h"
#include "support/tiny_checkpoint.h"

namespace stbllm::test {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  /// Both ends included.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  /// In [0, 1).
  double share() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  template <typename T>
  T any_of(std::initializer_list<T> values) {
    return values.begin()[between(0, std::ssize(values) - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

inline Scheme random_scheme(Random& random) {
  const int group = random.any_of({4, 8, 16});
  return {.nm = {static_cast<int>(random.between(1, group)), group},
          .levels = static_cast<int>(random.between(1, 3))};
}

/// With salient or outlier columns, narrow and wide column blocks, and searches that are switched off.
inline Method random_method(Random& random) {
  // Multiples of every M, so that any scheme goes with any method.
  const auto column_block = static_cast<int>(16 * random.between(1, 16));
  const double damping = random.any_of({0.0, 0.001, 0.01, 0.1});
  if (random.one_in(4))
    return RegionMethod{.importance = random.any_of({Importance::kMagnitude, Importance::kWanda,
                                                     Importance::kRia, Importance::kSi, Importance::kObs}),
                        .max_salient = static_cast<int>(random.any_of({0, 1, 7, 50})),
                        .column_block = column_block,
                        .compensate = random.any_of({Compensate::kNone, Compensate::kBlock}),
                        .damping = damping};
  LeanMethod lean{.column_block = column_block,
                  .scale_bits = random.any_of({4, 5, 6, 16}),
                  .compensate = random.any_of({Compensate::kNone, Compensate::kBlock, Compensate::kColumn}),
                  .damping = damping,
                  .shrink = random.any_of({0.0, 0.1, 0.5}),
                  .sequential = !random.one_in(3),
                  .token_weights = random.one_in(2),
                  .refit = static_cast<int>(random.between(0, 3)),
                  .descend = static_cast<int>(random.between(0, 3))};
  if (random.one_in(3))
    lean.outliers.reset();
  else
    lean.outliers = OutlierColumns{.share = random.any_of({0.002, 0.02, 0.2}),
                                   .limit = static_cast<int>(random.between(1, 5))};
  lean.asymmetry = lean.sequential ? random.any_of({0.0, 0.5, 1.0}) : 0.0;
  lean.residual = lean.sequential ? random.any_of({0.0, 0.5, 1.0}) : 0.0;
  return lean;
}

/// The levels of a lean linear are shared, which F16 scales have no room for.
inline Scheme fitting(Scheme scheme, const Method& method) {
  if (std::holds_alternative<LeanMethod>(method) && scale_bits(method) == 16) scheme.levels = 1;
  return scheme;
}

inline Recipe random_recipe(Random& random) {
  Recipe recipe;
  recipe.method = random_method(random);
  const bool lean = std::holds_alternative<LeanMethod>(recipe.method);
  if (lean && scale_bits(recipe.method) < 16 && random.one_in(3))
    recipe.model.allocation = BudgetAllocation{.target_bpw = 1 + 2 * random.share()};
  else
    recipe.model.allocation = PatternAllocation{
        .vary = random.any_of({PatternAllocation::Vary::kNot, PatternAllocation::Vary::kByNorm,
                               PatternAllocation::Vary::kByOutliers}),
        .scheme = fitting(random_scheme(random), recipe.method)};
  if (random.one_in(4)) recipe.model.rules.push_back({.linears = "*.self_attn.v_proj", .code = {}});
  if (random.one_in(4))
    recipe.model.rules.push_back(
        {.linears = "*.self_attn.k_proj", .code = fitting(random_scheme(random), recipe.method)});
  const auto coding = [&] {
    return random.any_of({RowCoding::kKeep, RowCoding::kFloat16, RowCoding::kInt8, RowCoding::kInt4});
  };
  recipe.model.embedding = coding();
  recipe.model.head = coding();
  if (lean && random.one_in(6)) recipe.training.tune = TrainingPolicy::kDefaultTune;
  if (lean && random.one_in(6)) recipe.training.distill = TrainingPolicy::kDefaultDistill;
  recipe.validate();
  return recipe;
}

/// LLaMA, Mistral, Qwen2, Qwen3 or OPT with sizes that are seldom a multiple of anything, down to one.
inline TinyModel random_model(Random& random) {
  TinyModel model = random.any_of({&tiny_llama, &tiny_mistral, &tiny_qwen2, &tiny_qwen3, &tiny_opt})();
  const bool opt = model.config["model_type"] == "opt";
  const int64_t kv_heads = random.between(1, 3), heads = opt ? kv_heads : kv_heads * random.between(1, 3);
  const int64_t head_dim = opt ? random.between(1, 40) : 2 * random.between(1, 20);  // rotary: even
  const int64_t ffn = random.one_in(8) ? 1 : random.between(2, 300);
  model.config.update({{"num_hidden_layers", random.between(1, 3)},
                       {"num_attention_heads", heads},
                       {"vocab_size", kTinyVocabSize + random.between(0, 40)},
                       {"tie_word_embeddings", random.one_in(2)}});
  if (opt)
    model.config.update({{"hidden_size", heads * head_dim},
                         {"ffn_dim", ffn},
                         {"word_embed_proj_dim", random.one_in(2) ? heads * head_dim : random.between(1, 50)},
                         {"do_layer_norm_before", random.one_in(2)},
                         {"activation_function", random.any_of({"relu", "gelu"})},
                         {"enable_bias", random.one_in(2)}});
  else
    model.config.update({{"hidden_size", random.between(1, 150)},
                         {"intermediate_size", ffn},
                         {"num_key_value_heads", kv_heads},
                         {"head_dim", head_dim}});
  if (model.config["model_type"] == "llama")
    model.config.update({{"attention_bias", random.one_in(2)}, {"mlp_bias", random.one_in(2)}});
  model.dtype = random.any_of({"F32", "F16", "BF16"});
  model.shards = static_cast<int>(random.between(1, 3));
  model.seed = static_cast<uint64_t>(random.between(0, 1 << 30));
  return model;
}

struct RandomCase {
  TinyModel model;
  Recipe recipe;
  int64_t samples, seqlen, blocks;
  uint64_t seed;

  explicit RandomCase(uint64_t number) : seed(number) {
    Random random(number);
    model = random_model(random);
    recipe = random_recipe(random);
    samples = random.between(2, 20);
    seqlen = random.between(2, 60);
    blocks = random.one_in(4) ? 1 : -1;
  }
  std::string describe() const {
    return fmt::format("case {}: {} windows of {} tokens, blocks {}\n{}\n{}", seed, samples, seqlen, blocks,
                       model.config.dump(), recipe.to_json().dump());
  }
};

}  // namespace stbllm::test
