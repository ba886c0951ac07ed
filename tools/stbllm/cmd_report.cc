#include <fmt/format.h>

#include <filesystem>

#include "commands.h"
#include "report_page.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"

namespace stbllm {
namespace {

struct Options {
  std::string input, output;
  bool force = false;
};

void run(const Options& options) {
  const std::string report = read_text(options.input);
  if (std::filesystem::exists(options.output) && !options.force)
    fail(ErrorCode::kExists, "{}: the output is there already; choose another path or pass --force",
         options.output);
  std::string page;
  try {
    page = report_page(parse_json(report));
  } catch (const nlohmann::json::exception& error) {
    fail(ErrorCode::kCorrupt, "{}: not a report of 'stbllm quantize --report' ({})", options.input,
         error.what());
  }
  write_text(options.output, page);
  fmt::print("{}\n", options.output);
}

}  // namespace

void add_report(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("report", "Turn the report of a quantization into one HTML page");
  command->add_option("report", options->input, "What 'stbllm quantize --report' wrote")->required();
  command->add_option("-o,--output", options->output, "The page to write (.html)")->required();
  command->add_flag("--force", options->force, "Overwrite the output");
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
