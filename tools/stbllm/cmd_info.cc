#include <fmt/format.h>

#include "commands.h"
#include "quantize_request.h"
#include "stbllm/base/log.h"
#include "stbllm/base/reproducible.h"
#include "stbllm/run/estimate.h"

namespace stbllm {
namespace {

struct Options : QuantizeRequest {
  CommonOptions common;
};

/// What a preset would make of the checkpoint.
struct Cost {
  std::string preset;
  double stored_bits;
  Estimate estimate;
};

nlohmann::json to_json(const ModelSpec& spec) {
  return {{"architecture", spec.architecture->hf_class},
          {"blocks", spec.layers},
          {"hidden", spec.hidden},
          {"ffn", spec.ffn},
          {"heads", spec.heads},
          {"kv_heads", spec.kv_heads},
          {"head_dim", spec.head_dim},
          {"vocab", spec.vocab},
          {"positions", spec.max_positions},
          {"sliding_window", spec.sliding_window},
          {"tied_head", spec.tied_head},
          {"linears", spec.layers * std::ssize(spec.linears(0))},
          {"linear_weights", spec.linear_weights()},
          {"table_weights", (spec.tied_head ? 1 : 2) * spec.vocab * spec.embedding_width}};
}

void print_model(const std::string& path, const ModelSpec& spec) {
  const auto millions = [](int64_t count) { return static_cast<double>(count) / 1e6; };
  fmt::print("{}: {}\n", path, spec.architecture->hf_class);
  fmt::print("  {} blocks, hidden {}, MLP {}, {} heads of {} ({} for keys and values), {} positions{}\n",
             spec.layers, spec.hidden, spec.ffn, spec.heads, spec.head_dim, spec.kv_heads, spec.max_positions,
             spec.sliding_window > 0 ? fmt::format(", attention to the last {}", spec.sliding_window) : "");
  fmt::print("  {:.1f} M weights in {} linears; vocabulary {}, {:.1f} M in {}\n\n",
             millions(spec.linear_weights()), spec.layers * std::ssize(spec.linears(0)), spec.vocab,
             millions((spec.tied_head ? 1 : 2) * spec.vocab * spec.embedding_width),
             spec.tied_head ? "one table for embedding and head" : "embedding and head");
}

void run(Options options) {
  make_products_reproducible();
  apply(options.common);
  const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  if (!options.common.json) print_model(options.checkpoint, spec);
  const Calibration calibration = read_calibration(options, checkpoint, spec, assemble_recipe(options), "");
  std::vector<Cost> costs;
  std::vector<Recipe> recipes;
  for (const std::string& preset : Recipe::preset_names()) recipes.push_back(Recipe::load(preset));
  std::erase_if(recipes, [](const Recipe& recipe) { return !has_packed_form(recipe.method); });
  log::Progress progress("preset", std::ssize(recipes));
  for (const Recipe& recipe : recipes) {
    const Estimate estimate = estimate_quantization(checkpoint, calibration, recipe, {});
    costs.push_back(
        {recipe.name,
         8 * static_cast<double>(estimate.linear_bytes) / static_cast<double>(spec.linear_weights()),
         estimate});
    progress.update(std::ssize(costs));
  }
  if (options.common.json) {
    nlohmann::json json = {{"checkpoint", options.checkpoint}, {"model", to_json(spec)}};
    for (const Cost& cost : costs)
      json["presets"].push_back({{"name", cost.preset},
                                 {"stored_bits", cost.stored_bits},
                                 {"file_bytes", cost.estimate.linear_bytes + cost.estimate.dense_bytes},
                                 {"peak_memory_bytes", cost.estimate.peak_memory_bytes},
                                 {"seconds", cost.estimate.seconds}});
    print_json(json);
    return;
  }
  fmt::print("  {:<14} {:>12} {:>10} {:>12} {:>9}\n", "preset", "bits/weight", "file", "peak memory",
             "minutes");
  for (const Cost& cost : costs)
    fmt::print("  {:<14} {:>12.3f} {:>10} {:>12} {:>9.1f}\n", cost.preset, cost.stored_bits,
               human_bytes(static_cast<double>(cost.estimate.linear_bytes + cost.estimate.dense_bytes)),
               human_bytes(static_cast<double>(cost.estimate.peak_memory_bytes)), cost.estimate.seconds / 60);
  fmt::print("\n  without training; --minutes N trains in the time that is left of N minutes\n");
}

}  // namespace

void add_info(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "info", "What a checkpoint is, and what each preset would cost in bytes, memory and minutes");
  add_checkpoint(*command, *options);
  add_calibration_options(*command, *options);
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
