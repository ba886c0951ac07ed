#include <fmt/format.h>

#include "command_tree.h"
#include "commands.h"
#include "self_text.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"
#include "stbllm/base/text_file.h"

namespace stbllm {
namespace {

struct Options {
  std::string model, output, from, backend = "auto", dtype = "bfloat16";
  bool force = false;
  WriteTextsOptions write;
  CommonOptions common;
};

void run(const Options& options) {
  apply(options.common);
  if (!std::filesystem::path(options.output).filename().string().ends_with(".jsonl"))
    fail(ErrorCode::kUsage, "{}: the texts become lines of JSON; choose a name that ends in .jsonl",
         options.output);
  if (!options.force) refuse_existing_output(options.output);
  const LoadedModel model = load_model(options.model, options.backend, options.dtype, /*keep_blocks=*/true);
  const double started = seconds_now();
  const WrittenTexts written = write_lines(model, options.from, options.write);
  const double speed = static_cast<double>(written.tokens) / (seconds_now() - started);
  write_text(options.output, written.lines);
  if (options.common.json)
    print_json({{"output", options.output},
                {"texts", written.texts},
                {"tokens", written.tokens},
                {"tokens_per_second", speed}});
  else
    fmt::print("{}: {} texts, {} tokens, {:.1f} tokens/s\n", options.output, written.texts, written.tokens,
               speed);
}

}  // namespace

void add_write_text(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "write-text", "Let a model write texts by itself, to calibrate on where there is no corpus");
  add_model(*command, options->model);
  command
      ->add_option("-o,--output", options->output, "The texts, an object with a \"text\" per line (.jsonl)")
      ->required();
  command->add_option("-n,--tokens", options->write.tokens, "Of all texts together")
      ->check(above_zero())
      ->capture_default_str();
  command->add_option("--longest", options->write.longest, "Tokens of a text, at most the model's positions")
      ->check(above_zero())
      ->capture_default_str();
  command->add_option(
      "--from", options->from,
      "Begin with the first words of lines of this text; default: with a word of the vocabulary");
  command->add_option("--temperature", options->write.temperature, "Logits are divided by it")
      ->check(above_zero())
      ->capture_default_str();
  command
      ->add_option("--top-p", options->write.top_p,
                   "Sample from the likeliest tokens that reach this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--seed", options->write.seed, "Same seed, same texts, on one machine")
      ->capture_default_str();
  command->add_flag("--force", options->force, "Overwrite the output");
  add_runtime(*command, options->backend, options->dtype);
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
