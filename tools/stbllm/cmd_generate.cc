#include <fmt/format.h>

#include <cstdio>
#include <iostream>

#include "command_tree.h"
#include "commands.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/eval/generate.h"
#include "stbllm/model/load_model.h"

namespace stbllm {
namespace {

struct Options {
  std::string model, prompt, backend = "auto", dtype = "bfloat16";
  GenerateOptions generate;
  CommonOptions common;
};

void run(const Options& options) {
  apply(options.common);
  if (options.generate.temperature == 0 && options.generate.top_p < 1)
    fail(ErrorCode::kUsage, "--top-p {}: nothing is sampled at temperature 0; add --temperature",
         options.generate.top_p);
  const LoadedModel model = load_model(options.model, options.backend, options.dtype, /*keep_blocks=*/true);
  const std::vector<int32_t> prompt = model.tokenizer->encode(options.prompt);
  if (prompt.empty()) fail(ErrorCode::kUsage, "--prompt: the text gives no token; write at least one word");
  GenerateOptions generate_options = options.generate;
  generate_options.stop_ids = model.stop_ids();
  std::vector<int32_t> ids = prompt;
  // A token is decoded behind those printed just before it: at the beginning of a text some decoders drop a
  // space.
  size_t context = 0, printed = 0;
  const auto text_of = [&](size_t first, size_t end) {
    return model.tokenizer->decode(std::span(ids).subspan(first, end - first));
  };
  const auto print_rest = [&](bool all) {
    const std::string before = text_of(context, printed), text = text_of(context, ids.size());
    if (text.size() <= before.size() || (!all && text.ends_with("\uFFFD")))
      return;  // the next token may complete the character
    fmt::print("{}", text.substr(before.size()));
    std::fflush(stdout);
    context = printed;
    printed = ids.size();
  };
  // The prompt is printed with the first new token: what cannot go on is refused before anything is shown.
  const Generation result = generate(model.decoder, prompt, generate_options, [&](int32_t id) {
    ids.push_back(id);
    if (!options.common.json) print_rest(/*all=*/false);
    return true;
  });
  if (!options.common.json) print_rest(/*all=*/true);
  const double prefill = static_cast<double>(result.prompt_tokens) / result.prefill_seconds;
  const double decode =
      result.decode_seconds > 0 ? static_cast<double>(result.decode_passes) / result.decode_seconds : 0;
  if (options.common.json) {
    print_json({{"text", text_of(0, ids.size()).substr(text_of(0, prompt.size()).size())},
                {"ids", result.ids},
                {"prompt_tokens", result.prompt_tokens},
                {"prefill_tokens_per_second", prefill},
                {"decode_tokens_per_second", decode},
                {"backend", model.backend}});
    return;
  }
  fmt::print("\n\n");
  if (!log::shows(log::Level::kInfo)) return;
  std::fflush(stdout);  // which the next line may share a pipe with
  fmt::print(stderr, "prompt {} tokens, {:.1f} tokens/s; generated {} tokens, {:.1f} tokens/s ({}, {})\n",
             result.prompt_tokens, prefill, result.ids.size(), decode, model.backend, options.dtype);
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text");
  add_model(*command, options->model);
  command->add_option("-p,--prompt", options->prompt, "The text to continue")->required();
  command->add_option("-n,--tokens", options->generate.max_tokens, "At most so many new tokens")
      ->check(above_zero())
      ->capture_default_str();
  command->add_option("--temperature", options->generate.temperature, "0: always the most likely token")
      ->check(zero_or_more())
      ->capture_default_str();
  command
      ->add_option("--top-p", options->generate.top_p,
                   "Sample from the likeliest tokens that reach this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--seed", options->generate.seed, "Same seed, same text");
  add_runtime(*command, options->backend, options->dtype);
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
