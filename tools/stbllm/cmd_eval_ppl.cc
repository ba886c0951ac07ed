#include <fmt/format.h>

#include "commands.h"
#include "evaluation_text.h"
#include "stbllm/eval/divergence.h"

namespace stbllm {
namespace {

struct Options {
  std::string model, reference;
  EvaluationText text;
  CommonOptions common;
};

void run(const Options& options) {
  apply(options.common);
  const LoadedModel model = load_model(options.model, options.text.backend, options.text.dtype);
  const Corpus corpus = read_corpus(options.text.data);
  const Windows windows = windows_of(options.text, corpus, model);
  Perplexity result;
  nlohmann::json json;
  if (options.reference.empty()) {
    result = evaluate_perplexity(model.decoder, windows, scoring(options.text));
  } else {
    const LoadedModel reference = load_model(options.reference, options.text.backend, options.text.dtype);
    const Decoder* const models[] = {&model.decoder};
    const Divergence divergence =
        evaluate_divergence(reference.decoder, models, windows, scoring(options.text));
    const ModelDivergence& of_model = divergence.models.front();
    result = of_model.model;
    json["kl"] = of_model.mean_kl;
    json["kl_error"] = of_model.kl_error;
    json["top1_agreement"] = of_model.top1_agreement;
    json["reference_perplexity"] = divergence.reference.perplexity;
  }
  json.update(to_json(options.text, corpus, result));
  json.update({{"model", options.model},
               {"perplexity", result.perplexity},
               {"standard_error", result.perplexity_error},
               {"mean_nll", result.mean_nll},
               {"nll_error", result.nll_error},
               {"seconds", result.seconds},
               {"tokens_per_second", result.tokens_per_second},
               {"backend", model.backend},
               {"peak_memory_bytes", peak_memory_bytes()}});
  if (options.common.json) {
    json["window_nll"] = result.window_nll;
    print_json(json);
    return;
  }
  fmt::print("perplexity {:.4f} +- {:.4f}   ({} predicted tokens, {} windows of {})   {:.0f} tokens/s\n",
             result.perplexity, result.perplexity_error, result.tokens, result.windows, result.seqlen,
             result.tokens_per_second);
  if (!options.reference.empty())
    fmt::print("KL to {} {:.4f} +- {:.4f} nats per token, top-1 agreement {:.2f} %\n", options.reference,
               json["kl"].get<double>(), json["kl_error"].get<double>(),
               100 * json["top1_agreement"].get<double>());
}

}  // namespace

void add_eval_ppl(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "eval-ppl", "Perplexity of a packed file or of a HuggingFace checkpoint (GPTQ's protocol)");
  add_model(*command, options->model);
  add_evaluation_text(*command, options->text);
  command->add_option("--kl", options->reference,
                      "Also the divergence from this model (the dense checkpoint)");
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
