#include <fmt/format.h>

#include "commands.h"
#include "quantize_request.h"
#include "stbllm/base/durable_file.h"
#include "stbllm/base/reproducible.h"
#include "stbllm/base/text_file.h"
#include "stbllm/run/quantize_model.h"

namespace stbllm {
namespace {

struct Options : QuantizeRequest {
  std::string output;
  bool force = false;
  CommonOptions common;
};

void run(Options options) {
  make_products_reproducible();
  apply(options.common);
  options.effort = "fast";  // a plan does not depend on training
  const Recipe recipe = assemble_recipe(options);
  if (!options.force) refuse_existing_output(options.output);
  const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  const Calibration calibration = read_calibration(options, checkpoint, spec, recipe,
                                                   std::filesystem::path(options.output).parent_path());
  QuantizeOptions quantize;
  quantize.plan_only = true;
  const Plan plan = plan_quantization(checkpoint, calibration, recipe, quantize);
  const double bits = stored_bits(plan, spec, recipe.method, spec.layers);
  const double share = static_cast<double>(planned_weights(plan, spec, spec.layers)) /
                       static_cast<double>(spec.linear_weights());
  const nlohmann::json file = {{"recipe", recipe.name},
                               {"calibration", calibration.provenance},
                               {"stored_bits", bits},
                               {"linears", to_json(plan, spec)}};
  write_text(options.output, json_text(file));
  if (options.common.json)
    print_json({{"output", options.output}, {"stored_bits", bits}, {"quantized_share", share}});
  else
    fmt::print(
        "{}\n  {}\n  stored bits per weight  at most {:.4f}, of the {:.1f} % of weights that are quantized\n",
        options.output, describe(plan, spec, spec.layers), bits, 100 * share);
}

}  // namespace

void add_plan(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "plan", "Choose the code of each linear and write it down, to be read, changed and given to quantize");
  add_checkpoint(*command, *options);
  command->add_option("-o,--output", options->output, "The plan to write (.json)")->required();
  add_recipe_options(*command, *options);
  add_calibration_options(*command, *options);
  command->add_flag("--force", options->force, "Overwrite the output");
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
