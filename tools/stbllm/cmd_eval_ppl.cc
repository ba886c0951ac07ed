#include <fmt/format.h>

#include <iostream>

#include "commands.h"
#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/eval/divergence.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/model/load_model.h"
#include "stbllm/text/corpus.h"

namespace stbllm {
namespace {

struct Options {
  std::string model, data = "wikitext2", backend = "auto", dtype = "float32", reference;
  int64_t seqlen = 0, windows = 0;
  EvaluationOptions evaluation;
  CommonOptions common;
};

void run(const Options& options) {
  apply(options.common);
  const LoadedModel model = load_model(options.model, options.backend, options.dtype);
  const Corpus corpus = read_corpus(options.data);
  const std::vector<int32_t> ids = model.tokenizer->encode(corpus.text);
  const int64_t seqlen =
      options.seqlen > 0 ? options.seqlen : std::min<int64_t>(2048, model.decoder.spec().max_positions);
  const Windows windows = evaluation_windows(ids, seqlen, options.windows, corpus.description);
  if (model.calibration_sha256 == corpus.sha256)
    log::warn("this model was calibrated on the text it is evaluated on; its perplexity is not comparable");
  log::info("{} on {}: {} tokens, {} windows of {}, backend {}, {}", options.model, corpus.description,
            ids.size(), windows.size(), seqlen, model.backend, options.dtype);
  Perplexity result;
  nlohmann::json json;
  if (options.reference.empty()) {
    result = evaluate_perplexity(model.decoder, windows, options.evaluation);
  } else {
    const LoadedModel reference = load_model(options.reference, options.backend, options.dtype);
    const Divergence divergence = evaluate_divergence(reference.decoder, model.decoder, windows);
    result = divergence.model;
    json["kl"] = divergence.mean_kl;
    json["kl_error"] = divergence.kl_error;
    json["top1_agreement"] = divergence.top1_agreement;
    json["reference_perplexity"] = divergence.reference.perplexity;
  }
  json.update({{"model", options.model},
               {"data", corpus.description},
               {"data_sha256", corpus.sha256},
               {"perplexity", result.perplexity},
               {"standard_error", result.perplexity_error},
               {"mean_nll", result.mean_nll},
               {"nll_error", result.nll_error},
               {"tokens", result.tokens},
               {"windows", result.windows},
               {"seqlen", result.seqlen},
               {"second_half", options.evaluation.second_half},
               {"seconds", result.seconds},
               {"tokens_per_second", result.tokens_per_second},
               {"backend", model.backend},
               {"dtype", options.dtype},
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
  command->add_option("model", options->model, "A packed .safetensors file or a checkpoint directory")
      ->required();
  command
      ->add_option("--data", options->data,
                   "'wikitext2', 'wikitext2-valid', 'c4', or a file (.txt, .raw, .jsonl, .jsonl.gz)")
      ->capture_default_str();
  command->add_option("--seqlen", options->seqlen, "Tokens per window; default min(2048, model)")
      ->check(CLI::PositiveNumber);
  command->add_option("--windows", options->windows, "Only the first so many windows")
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--backend", options->backend,
                   "Of packed linears: auto ($STBLLM_BACKEND, else the fastest), reference, cpu, "
                   "cpu-generic, cpu-avx2, cpu-avx512, cuda; a checkpoint runs dense, on cuda or not")
      ->capture_default_str();
  command
      ->add_option(
          "--dtype", options->dtype,
          "Activations: float32 (exact on the CPU; on cuda products round to 11 bits) or bfloat16 (fast)")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  command->add_option("--kl", options->reference,
                      "Also the divergence from this model (the dense checkpoint)");
  command
      ->add_flag("--second-half", options->evaluation.second_half,
                 "Score only the second half of each window, as llama.cpp's llama-perplexity does")
      ->excludes("--kl");
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
