#pragma once
// The text that eval-ppl and compare judge models on, and how.

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "stbllm/eval/perplexity.h"
#include "stbllm/model/load_model.h"
#include "stbllm/text/corpus.h"

namespace stbllm {

struct EvaluationText {
  std::string data = "wikitext2", backend = "auto", dtype = "float32", protocol = "gptq";
  int64_t seqlen = 0, windows = 0;  // 0: as the protocol says; all
  EvaluationOptions evaluation;
};

void add_evaluation_text(CLI::App& command, EvaluationText& text);

/// The windows of `corpus` for a model. Warns where the model was calibrated on that text.
Windows windows_of(const EvaluationText& text, const Corpus& corpus, const LoadedModel& model);
/// How they are scored.
EvaluationOptions scoring(const EvaluationText& text);

/// What a report says of a corpus and of how it is scored.
nlohmann::json to_json(const EvaluationText& text, const Corpus& corpus, const Perplexity& any);

}  // namespace stbllm
