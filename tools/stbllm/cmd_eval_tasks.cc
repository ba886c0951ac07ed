#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "command_tree.h"
#include "commands.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/log.h"
#include "stbllm/eval/choices.h"
#include "stbllm/model/load_model.h"

namespace stbllm {
namespace {

struct Options {
  std::string model, against, backend = "auto", dtype = "float32";
  std::vector<std::string> files;
  int64_t limit = 0;
  CommonOptions common;
};

/// The accuracies by name.
constexpr std::pair<const char*, std::vector<double> Answers::*> kAccuracies[] = {
    {"acc", &Answers::acc},
    {"acc_norm", &Answers::acc_norm},
    {"acc_bytes", &Answers::acc_bytes},
    {"acc_tokens", &Answers::acc_tokens}};

/// Of one task: the model's answers, and the reference's where there is one.
struct TaskResult {
  const QuestionSet* set;
  Answers model;
  std::optional<Answers> reference;

  MeanAndError difference(std::vector<double> Answers::*accuracy) const {
    std::vector<double> differences;
    for (size_t i = 0; i < model.acc.size(); ++i)
      differences.push_back((model.*accuracy)[i] - ((*reference).*accuracy)[i]);
    return mean_and_error(differences);
  }
};

std::vector<Answers> answer_all(const std::string& path, const Options& options,
                                const std::vector<QuestionSet>& sets) {
  const LoadedModel model = load_model(path, options.backend, options.dtype, /*keep_blocks=*/true);
  std::vector<Answers> all;
  for (const QuestionSet& set : sets) {
    log::Progress progress(fmt::format("{} on {}", path, set.task), std::ssize(set.questions));
    all.push_back(
        answer(model.decoder, *model.tokenizer, set.questions, [&](int64_t done) { progress.update(done); }));
  }
  return all;
}

nlohmann::json to_json(const TaskResult& result) {
  nlohmann::json json = {{"task", result.set->task},
                         {"questions", result.set->questions.size()},
                         {"log_likelihoods", result.model.log_likelihoods}};
  for (const auto& [name, accuracy] : kAccuracies) {
    const MeanAndError model = mean_and_error(result.model.*accuracy);
    json[name] = {{"value", model.mean}, {"standard_error", model.error}};
    if (!result.reference) continue;
    const MeanAndError difference = result.difference(accuracy);
    json[name].update({{"reference", mean_and_error((*result.reference).*accuracy).mean},
                       {"difference", difference.mean},
                       {"difference_error", difference.error}});
  }
  if (result.reference) json["reference_log_likelihoods"] = result.reference->log_likelihoods;
  return json;
}

void print_table(const Options& options, const std::vector<TaskResult>& results) {
  const auto percent = [](const MeanAndError& value) {
    return fmt::format("{:.2f} +- {:.2f}", 100 * value.mean, 100 * value.error);
  };
  const auto row = [&](const std::string& name, const std::string& questions, const auto& cell) {
    fmt::print("{:<20} {:>9}", name, questions);
    for (const auto& [accuracy_name, accuracy] : kAccuracies)
      fmt::print(" {:>15}", cell(accuracy_name, accuracy));
    fmt::print("\n");
  };
  row("task", "questions", [](const char* name, auto) { return std::string(name); });
  for (const TaskResult& result : results) {
    row(result.set->task, std::to_string(result.set->questions.size()),
        [&](const char*, auto accuracy) { return percent(mean_and_error(result.model.*accuracy)); });
    if (result.reference)
      row("  difference", "",
          [&](const char*, auto accuracy) { return percent(result.difference(accuracy)); });
  }
  fmt::print("\nPercent of right answers with standard errors");
  if (!options.against.empty()) fmt::print("; differences to {}, question by question", options.against);
  fmt::print("\n");
}

void run(const Options& options) {
  apply(options.common);
  std::vector<QuestionSet> sets;
  for (const std::string& file : options.files) sets.push_back(read_questions(file, options.limit));
  const double start = seconds_now();
  std::vector<TaskResult> results;
  for (Answers& answers : answer_all(options.model, options, sets))
    results.push_back({&sets[results.size()], std::move(answers), std::nullopt});
  if (!options.against.empty()) {
    std::vector<Answers> of_reference = answer_all(options.against, options, sets);
    for (size_t i = 0; i < results.size(); ++i) results[i].reference = std::move(of_reference[i]);
  }
  if (!options.common.json) {
    print_table(options, results);
    return;
  }
  nlohmann::json json = {
      {"model", options.model}, {"dtype", options.dtype}, {"seconds", seconds_now() - start}};
  if (!options.against.empty()) json["against"] = options.against;
  for (const TaskResult& result : results) json["tasks"].push_back(to_json(result));
  print_json(json);
}

}  // namespace

void add_eval_tasks(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "eval-tasks", "Multiple-choice tasks by log likelihood, from requests of lm-evaluation-harness");
  add_model(*command, options->model);
  command
      ->add_option("requests", options->files,
                   "JSON lines as lm-evaluation-harness writes them with --log_samples, or "
                   "scripts/task_requests.py; one task per file")
      ->required()
      ->expected(1, 1000);
  command->add_option("--against", options->against,
                      "Also the paired difference to this model, such as the dense checkpoint");
  command->add_option("--limit", options->limit, "Only the first so many questions of each task")
      ->check(above_zero());
  add_runtime(*command, options->backend, options->dtype);
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
