#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "commands.h"
#include "read_sweep.h"
#include "report_page.h"
#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"
#include "weights_figure.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> inputs;
  std::string output, points, linear, checkpoint;
  bool force = false;
};

void check_output(const Options& options) {
  std::error_code ignored;  // what is not there is no input
  std::vector<std::string> inputs = options.inputs;
  inputs.push_back(options.points);
  for (const std::string& input : inputs)
    if (fs::equivalent(options.output, input, ignored))
      fail(ErrorCode::kUsage, "{}: the page is made of it; choose another path to write to", options.output);
  if (!options.force) refuse_existing_output(options.output);
}

/// The page of what the inputs are: sweeps, one report, or a packed file whose weights are asked for.
std::string page_of(const Options& options) {
  const std::string& first = options.inputs.front();
  if (!options.linear.empty()) {
    if (options.inputs.size() != 1)
      fail(ErrorCode::kUsage, "--linear: expected one packed file, found {} inputs", options.inputs.size());
    return figure_page(weights_figure(first, options.checkpoint, options.linear));
  }
  if (fs::is_directory(first)) return figure_page(read_sweeps(options.inputs, options.points));
  if (options.inputs.size() != 1)
    fail(ErrorCode::kUsage, "{}: expected one report, or directories of sweeps, found {} inputs", first,
         options.inputs.size());
  if (!options.points.empty())
    fail(ErrorCode::kUsage, "--points: other tools go beside a sweep; {} is no directory", first);
  const std::string report = read_text(first);
  try {
    return report_page(parse_json(report));
  } catch (const nlohmann::json::exception& error) {
    fail(ErrorCode::kCorrupt, "{}: not a report of 'stbllm quantize --report' ({})", first, error.what());
  }
}

void run(const Options& options) {
  check_output(options);
  write_text(options.output, page_of(options));
  fmt::print("{}\n", options.output);
}

}  // namespace

void add_report(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("report", "One HTML page of a quantization, of sweeps or of weights");
  command
      ->add_option("inputs", options->inputs,
                   "What 'stbllm quantize --report' wrote, or directories of scripts/sweep.sh, or with "
                   "--linear a packed file")
      ->required();
  command->add_option("-o,--output", options->output, "The page to write (.html)")->required();
  command->add_option("--points", options->points,
                      "Points of other tools beside a sweep: CSV with the columns tool, label, bits, "
                      "file_bytes, perplexity, standard_error, text");
  CLI::Option* linear = command->add_option(
      "--linear", options->linear, "Draw the weights of this linear by what the packed file makes of them");
  CLI::Option* checkpoint =
      command->add_option("--checkpoint", options->checkpoint, "The checkpoint that has these weights");
  linear->needs(checkpoint)->excludes("--points");
  checkpoint->needs(linear);
  command->add_flag("--force", options->force, "Overwrite the output");
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
