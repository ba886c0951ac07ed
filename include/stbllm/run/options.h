#pragma once
// What a quantization is asked for beside the recipe and the text.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/model/model_spec.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {

struct QuantizeOptions {
  /// The packed file; with `dense_output` a HuggingFace directory of dequantized weights.
  std::filesystem::path output;
  bool dense_output = false;
  bool plan_only = false;  ///< for plan_quantization(): there is no output
  bool force = false;      ///< overwrite `output`, discard an unfinished run
  bool resume = false;     ///< continue the unfinished run beside `output`
  /// What the work directory remembers for who continues the run (WorkDirectory::remembered); null: nothing.
  nlohmann::json remember;
  /// A plan to follow (plan/plan.h) in place of what the recipe's allocation and rules say; null: none.
  nlohmann::json plan;
  int64_t blocks = -1;  ///< quantize only so many blocks, the others stay dense; below 0: all
  /// Where forward passes, Hessians, what quantize_linear() does there and training run: "cpu", "cuda" (the
  /// current device) or the name of a device that the program has registered with libtorch.
  std::string device = "cpu";
  bool compare_blocks = false;  ///< run the dense model beside, for QuantizeResult::blocks
  /// Bytes; hidden states go to a file where more would be needed. 0: what the machine has.
  int64_t max_memory = 0;

  int64_t quantized_blocks(const ModelSpec& spec) const {
    return blocks < 0 ? spec.layers : std::min(blocks, spec.layers);
  }
};

/// What the hidden states of calibration windows are kept in between blocks. Blocks compute in float32; a
/// rounding of 2^-9 is far below what one quantized block adds.
inline constexpr at::ScalarType kHiddenDtype = at::kBFloat16;

/// Whether hidden states behind each block are compared with the dense model's.
inline bool compares_blocks(const Recipe& recipe, const QuantizeOptions& options) {
  return recipe.training.any() || options.compare_blocks;
}

/// Whether the dense model's hidden states go along beside the quantized one's.
inline bool needs_dense_stream(const Recipe& recipe, const QuantizeOptions& options) {
  return compares_blocks(recipe, options) || is_asymmetric(recipe.method);
}

/// Where `options` wants forward passes to run. Throws Error(kUnsupported), with the reason, where that is
/// impossible.
at::Device calibration_device(const QuantizeOptions& options);

/// Refuses what can be refused before `checkpoint`, a directory, is read: Error(kUnsupported | kUsage |
/// kExists).
void check_request(const std::filesystem::path& checkpoint, const Recipe& recipe,
                   const QuantizeOptions& options, const ProcessGroup& group);

/// Refuses a plan, rules or a budget that do not fit the model: Error(kUsage).
void check_plan(const ModelSpec& spec, const Recipe& recipe, const QuantizeOptions& options);

}  // namespace stbllm
