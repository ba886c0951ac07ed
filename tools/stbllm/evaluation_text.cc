#include "evaluation_text.h"

#include <algorithm>
#include <span>

#include "command_tree.h"
#include "commands.h"
#include "stbllm/base/log.h"
#include "stbllm/text/overlap.h"

namespace stbllm {

void add_evaluation_text(CLI::App& command, EvaluationText& text) {
  command
      .add_option("--data", text.data,
                  "A text that is looked for in $STBLLM_DATA, or a file (.txt, .raw, .jsonl, .jsonl.gz)")
      ->check(suggest({"wikitext2", "wikitext2-valid", "c4", "FILE"}))
      ->capture_default_str();
  command
      .add_option("--protocol", text.protocol,
                  "gptq: all tokens of windows of min(2048, model); llama.cpp: the second halves of windows "
                  "of 512, as llama-perplexity scores them")
      ->check(CLI::IsMember({"gptq", "llama.cpp"}))
      ->capture_default_str();
  command.add_option("--seqlen", text.seqlen, "Tokens per window, in place of the protocol's")
      ->check(above_zero());
  command.add_option("--windows", text.windows, "Only the first so many windows")->check(above_zero());
  command.add_flag("--second-half", text.evaluation.second_half, "Score the second half of each window only");
  add_runtime(command, text.backend, text.dtype);
}

EvaluationOptions scoring(const EvaluationText& text) {
  EvaluationOptions options = text.evaluation;
  options.second_half |= text.protocol == "llama.cpp";
  return options;
}

Windows windows_of(const EvaluationText& text, const Corpus& corpus, const LoadedModel& model) {
  const std::vector<int32_t> ids = model.tokenizer->encode(corpus.text);
  const int64_t usual = text.protocol == "llama.cpp" ? 512 : 2048;
  const int64_t seqlen = text.seqlen > 0 ? text.seqlen : std::min(usual, model.decoder.spec().max_positions);
  Windows windows = evaluation_windows(ids, seqlen, text.windows, corpus.description);
  const auto evaluated = std::span(ids).first(windows.size() * static_cast<size_t>(seqlen));
  if (std::ranges::find(model.calibration_sha256, corpus.sha256) != model.calibration_sha256.end())
    log::warn("{} was calibrated on the text it is evaluated on; its perplexity is not comparable",
              model.path);
  else if (const int64_t seen = count_marks(evaluated, model.calibration_marks); seen > 0)
    log::warn(
        "{} was calibrated on parts of this text: {} of {} windows occur in it; its perplexity is not "
        "comparable",
        model.path, seen, model.calibration_marks.size());
  log::info("{} on {}: {} tokens, {} windows of {}, backend {}, {}", model.path, corpus.description,
            ids.size(), windows.size(), seqlen, model.backend, text.dtype);
  return windows;
}

nlohmann::json to_json(const EvaluationText& text, const Corpus& corpus, const Perplexity& any) {
  return {{"data", corpus.description}, {"data_sha256", corpus.sha256},
          {"tokens", any.tokens},       {"windows", any.windows},
          {"seqlen", any.seqlen},       {"second_half", scoring(text).second_half},
          {"dtype", text.dtype}};
}

}  // namespace stbllm
