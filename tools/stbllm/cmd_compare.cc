#include <fmt/format.h>

#include <algorithm>

#include "commands.h"
#include "evaluation_text.h"
#include "stbllm/base/error.h"
#include "stbllm/eval/divergence.h"

namespace stbllm {
namespace {

struct Options {
  std::vector<std::string> models;
  EvaluationText text;
  CommonOptions common;
};

/// The number and the divergence of the window that suffers most.
std::pair<int64_t, double> worst_window(const ModelDivergence& model) {
  const auto worst = std::ranges::max_element(model.window_kl);
  return {worst - model.window_kl.begin(), *worst};
}

nlohmann::json perplexity_json(const std::string& name, const Perplexity& result) {
  return {{"model", name},
          {"perplexity", result.perplexity},
          {"standard_error", result.perplexity_error},
          {"mean_nll", result.mean_nll},
          {"window_nll", result.window_nll}};
}

nlohmann::json divergence_json(const std::string& name, const ModelDivergence& model) {
  nlohmann::json json = perplexity_json(name, model.model);
  json.update({{"nll_difference", model.nll_difference},
               {"difference_error", model.difference_error},
               {"kl", model.mean_kl},
               {"kl_error", model.kl_error},
               {"top1_agreement", model.top1_agreement},
               {"window_kl", model.window_kl}});
  return json;
}

void print_table(const Options& options, const Divergence& result) {
  const auto cell = [](double mean, double error) { return fmt::format("{:.3f} +- {:.3f}", mean, error); };
  size_t width = 5;
  for (const std::string& name : options.models) width = std::max(width, name.size());
  fmt::print("{:<{}} {:>18} {:>18} {:>18} {:>7} {:>16}\n", "model", width, "perplexity", "NLL difference",
             "KL", "top-1", "worst window");
  fmt::print("{:<{}} {:>18}\n", options.models.front(), width,
             cell(result.reference.perplexity, result.reference.perplexity_error));
  for (size_t m = 0; m < result.models.size(); ++m) {
    const ModelDivergence& model = result.models[m];
    const auto [window, kl] = worst_window(model);
    fmt::print("{:<{}} {:>18} {:>18} {:>18} {:>5.1f} % {:>16}\n", options.models[m + 1], width,
               cell(model.model.perplexity, model.model.perplexity_error),
               cell(model.nll_difference, model.difference_error), cell(model.mean_kl, model.kl_error),
               100 * model.top1_agreement, fmt::format("{:.3f} in {}", kl, window));
  }
  fmt::print("\n{} predicted tokens, {} windows of {}; NLL difference, KL and top-1 agreement are to {}\n",
             result.reference.tokens, result.reference.windows, result.reference.seqlen,
             options.models.front());
}

void run(const Options& options) {
  apply(options.common);
  const Corpus corpus = read_corpus(options.text.data);
  std::vector<LoadedModel> models;
  Windows windows;
  for (const std::string& path : options.models) {
    models.push_back(load_model(path, options.text.backend, options.text.dtype));
    Windows own = windows_of(options.text, corpus, models.back());
    if (models.size() > 1 && own != windows)
      fail(ErrorCode::kMismatch,
           "{} and {} cut the text into other tokens or windows; compare models of one tokenizer, with "
           "--seqlen",
           options.models.front(), path);
    windows = std::move(own);
  }
  std::vector<const Decoder*> decoders;
  for (const LoadedModel& model : models) decoders.push_back(&model.decoder);
  const Divergence result =
      evaluate_divergence(*decoders.front(), std::span(decoders).subspan(1), windows, scoring(options.text));
  if (!options.common.json) {
    print_table(options, result);
    return;
  }
  nlohmann::json json = to_json(options.text, corpus, result.reference);
  json["reference"] = perplexity_json(options.models.front(), result.reference);
  json["models"] = nlohmann::json::array();
  for (size_t m = 0; m < result.models.size(); ++m)
    json["models"].push_back(divergence_json(options.models[m + 1], result.models[m]));
  print_json(json);
}

}  // namespace

void add_compare(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "compare", "Models against the first one: perplexity, paired difference, divergence, worst window");
  command
      ->add_option("models", options->models,
                   "Packed .safetensors files or checkpoint directories; the first is what the others are "
                   "compared with")
      ->required()
      ->expected(2, 1000);
  add_evaluation_text(*command, options->text);
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
