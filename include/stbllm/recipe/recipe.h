#pragma once
// A recipe: the method of a linear, the policy of a model and the policy of training, as one value that a
// JSON file spells out. RTN, BiLLM and STBLLM are recipes, and an ablation is an edit of one field. The
// presets are the files of configs/, compiled in.

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "stbllm/quantize/method.h"
#include "stbllm/quantize/scheme.h"

namespace stbllm {

/// Every linear gets the scheme, or one whose N varies from block to block around it (plan/allocate.h).
struct PatternAllocation {
  enum class Vary { kNot, kByNorm, kByOutliers };
  Vary vary = Vary::kNot;
  Scheme scheme;
};

/// Each linear gets a scheme of its own, so that together they store at most so many bits per weight.
struct BudgetAllocation {
  double target_bpw = 0;  ///< stored bits per weight of the linears, above 0
};

using Allocation = std::variant<PatternAllocation, BudgetAllocation>;

/// The scheme of most linears: the one of a pattern, and what a budget of so many bits gives most of them.
inline Scheme usual_scheme(const Allocation& allocation) {
  if (const auto* pattern = std::get_if<PatternAllocation>(&allocation)) return pattern->scheme;
  const double bits = std::get<BudgetAllocation>(allocation).target_bpw;
  if (bits < 1.05) return {.nm = {2, 8}, .levels = 1};
  if (bits < 1.7) return {.nm = {3, 8}, .levels = 1};
  return {.nm = {3, 4}, .levels = 2};
}

/// How a table of rows (embedding, head) is stored.
enum class RowCoding { kKeep, kFloat16, kInt8, kInt4 };

/// What some linears get whatever the allocation says.
struct LinearRule {
  std::string linears;         ///< a glob over full names: "*.down_proj", "model.layers.0.*"
  std::optional<Scheme> code;  ///< nothing: they keep the checkpoint's weights

  bool names(const std::string& linear) const;
  bool operator==(const LinearRule&) const = default;
};

struct ModelPolicy {
  Allocation allocation;
  std::vector<LinearRule> rules;  ///< of several that name a linear the last one counts
  RowCoding embedding = RowCoding::kKeep;
  RowCoding head = RowCoding::kKeep;  ///< of a head of its own; a tied head is the embedding

  /// The rule that counts for a linear, or null.
  const LinearRule* rule_for(const std::string& linear) const;
  bool keeps(const std::string& linear) const {
    const LinearRule* rule = rule_for(linear);
    return rule != nullptr && !rule->code;
  }
};

/// One stage of training by Adam. Rates are relative to the size of what they move.
struct TrainingStage {
  int epochs = 1;
  double lr = 0.005;       ///< of scales, levels, norms and biases
  double code_lr = 0.005;  ///< of the latent weights behind the codes; 0: codes stay
};

struct TrainingPolicy {
  std::optional<TrainingStage> tune;     ///< each block against the dense model's hidden states
  std::optional<TrainingStage> distill;  ///< the whole model against the dense model's logits

  static constexpr TrainingStage kDefaultTune{.epochs = 1, .lr = 0.005, .code_lr = 0.005};
  static constexpr TrainingStage kDefaultDistill{.epochs = 1, .lr = 0.002, .code_lr = 0.001};

  bool any() const { return tune || distill; }
};

struct Recipe {
  std::string name = "custom";
  Method method;
  ModelPolicy model;
  TrainingPolicy training;

  /// A preset by name, or the recipe in a JSON file when `name_or_path` ends in .json. Throws
  /// Error(kUsage | kNotFound).
  static Recipe load(const std::string& name_or_path);
  /// {"name", "description", "method": {"kind": "lean" | "regions", ..}, "model": {..}, "training": {..}}.
  /// A field that is left out keeps the default of its type above; null leaves an optional part out. Throws
  /// Error(kUsage) naming a field that is unknown or has another name now, has no effect beside the others,
  /// is out of range or does not go with another.
  ///
  /// With `asked_for` a field without effect is refused only if its path is among these; the others came
  /// along with a preset and are ignored.
  static Recipe from_json(const nlohmann::json& json, const std::vector<std::string>* asked_for = nullptr);
  /// Every field that has an effect.
  nlohmann::json to_json() const;
  static std::vector<std::string> preset_names();

  /// Throws as from_json() does.
  void validate() const;
};

/// Sets a field of a recipe's JSON by its path, such as "method.refit" or "training.tune.epochs", making the
/// objects on the way. null leaves an optional part out ("method.outliers", "training.tune"). Throws
/// Error(kUsage) for a path that leads through a value; whether the field exists is for from_json() to say.
void set_field(nlohmann::json& recipe, const std::string& path, nlohmann::json value);

}  // namespace stbllm
