#include "stbllm/run/options.h"

#include <ATen/Context.h>
#include <c10/core/DeviceType.h>

#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"
#include "stbllm/model/torch_cuda.h"
#include "stbllm/plan/budget.h"
#include "stbllm/plan/plan.h"
#include "stbllm/quantize/scheme.h"

namespace stbllm {

namespace fs = std::filesystem;

at::Device calibration_device(const QuantizeOptions& options) {
  if (options.device == "cpu") return at::kCPU;
  if (options.device != "cuda") {
    // A device that the program itself has given libtorch.
    const bool registered =
        c10::is_privateuse1_backend_registered() && options.device == c10::get_privateuse1_backend();
    if (!registered) fail(ErrorCode::kUsage, "device '{}': expected cpu or cuda", options.device);
    return {at::kPrivateUse1, 0};
  }
  if (const std::string fault = torch_cuda_fault(); !fault.empty())
    fail(ErrorCode::kUnsupported, "device 'cuda' cannot calibrate here: {}; or use 'cpu'", fault);
  const int index = local_rank(), count = static_cast<int>(at::getNumGPUs());
  if (index >= count)
    fail(ErrorCode::kUsage, "LOCAL_RANK={}: this machine has {} CUDA devices; start one process for each",
         index, count);
  return {at::kCUDA, static_cast<c10::DeviceIndex>(index)};
}

namespace {

/// Throws where a part of the recipe cannot run as it is asked for.
void check_recipe(const Recipe& recipe, const QuantizeOptions& options, const ProcessGroup& group) {
  recipe.validate();
  if (!has_packed_form(recipe.method) && !options.dense_output)
    fail(ErrorCode::kUnsupported,
         "recipe '{}' does not give N:M sparse weights and has no packed form; write a dense checkpoint with "
         "--dense",
         recipe.name);
  if (!recipe.training.any()) return;
  if (group.size() > 1)
    fail(ErrorCode::kUnsupported,
         "recipe '{}' tunes or distils, which works in one process only, and WORLD_SIZE is {}; start one, or "
         "set training.tune and training.distill to null",
         recipe.name, group.size());
}

/// Throws where the output cannot or may not be written.
void check_output(const fs::path& checkpoint, const QuantizeOptions& options) {
  std::error_code ignored;
  if (!fs::exists(fs::symlink_status(options.output, ignored))) return;
  const fs::path directory =
      options.dense_output ? options.output : fs::absolute(options.output).parent_path();
  if (fs::equivalent(directory, checkpoint, ignored))
    fail(ErrorCode::kUsage, "{}: this would overwrite a part of the checkpoint itself; choose another path",
         options.output.string());
  if (fs::is_directory(options.output) != options.dense_output)
    fail(ErrorCode::kUsage, "{}: a {} is there, and {}; choose another path", options.output.string(),
         options.dense_output ? "file" : "directory",
         options.dense_output ? "--dense writes a directory" : "the packed model is one file");
  if (!options.force) refuse_existing_output(options.output);
}

/// Throws where the method of the recipe cannot give a linear this scheme.
void check_scheme(const Scheme& scheme, const Recipe& recipe, const std::string& linear) {
  const auto* lean = std::get_if<LeanMethod>(&recipe.method);
  if (lean != nullptr && lean->scale_bits == 16 && scheme.levels > 1)
    fail(ErrorCode::kUsage,
         "{}: code {} has {} levels, and recipe {} has a scale of its own for each column block and so one "
         "level; take {}, or a recipe like stbllm-2bit",
         linear, code_text(scheme), scheme.levels, recipe.name, code_text(Scheme{scheme.nm, 1}));
  if (column_block(recipe.method) % scheme.nm.group != 0)
    fail(ErrorCode::kUsage, "{}: groups of {} do not divide the {} columns that share a scale in recipe {}",
         linear, scheme.nm.group, column_block(recipe.method), recipe.name);
}

}  // namespace

void check_request(const fs::path& checkpoint, const Recipe& recipe, const QuantizeOptions& options,
                   const ProcessGroup& group) {
  check_recipe(recipe, options, group);
  calibration_device(options);
  if (options.plan_only) return;
  if (!options.output.has_filename())
    fail(ErrorCode::kUsage, "{}: the output is a file; write its name behind the directory",
         options.output.string());
  if (group.rank() == 0) check_output(checkpoint, options);
}

void check_plan(const ModelSpec& spec, const Recipe& recipe, const QuantizeOptions& options) {
  if (options.blocks > spec.layers)
    fail(ErrorCode::kUsage, "--blocks {}: the model has {}", options.blocks, spec.layers);
  const int64_t blocks = options.quantized_blocks(spec);
  if (options.plan.is_null()) {
    check_rules(spec, recipe.model, blocks);
    for (int64_t i = 0; i < blocks; ++i)
      for (const LinearSpec& linear : spec.linears(i))
        if (const LinearRule* rule = recipe.model.rule_for(linear.name); rule != nullptr && rule->code)
          check_scheme(*rule->code, recipe, linear.name);
    check_budget(spec, recipe, blocks);
    return;
  }
  const Plan plan = plan_from_json(options.plan, spec);
  if (planned_weights(plan, spec, blocks) == 0)
    fail(ErrorCode::kUsage, "the plan keeps the weights of all linears; nothing is left to quantize");
  for (const auto& [linear, own] : plan) check_scheme(own.scheme, recipe, linear);
}

}  // namespace stbllm
