#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <optional>

#include "command_tree.h"
#include "commands.h"
#include "quantize_request.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/log.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/profile.h"
#include "stbllm/base/reproducible.h"
#include "stbllm/base/text_file.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/pack/ledger.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/run/estimate.h"
#include "stbllm/run/memory.h"
#include "stbllm/run/quantize_model.h"
#include "stbllm/run/time_budget.h"
#include "stbllm/run/work_directory.h"

namespace stbllm {
namespace {

struct Options : QuantizeRequest {
  std::string plan, report;
  double minutes = 0;  // 0: as long as it takes
  bool dry_run = false, profile = false;
  QuantizeOptions quantize;
  CommonOptions common;
};

nlohmann::json stages_json(const std::vector<Stage>& stages) {
  nlohmann::json json = nlohmann::json::array();
  for (const Stage& stage : stages)
    json.push_back(
        {{"name", stage.name}, {"seconds", stage.seconds}, {"flops", stage.flops}, {"calls", stage.calls}});
  return json;
}

void print_stages(const std::vector<Stage>& stages, double total) {
  fmt::print("  {:<28} {:>9} {:>7} {:>9} {:>7}\n", "stage", "seconds", "%", "GFLOP/s", "calls");
  for (const Stage& stage : stages) {
    const auto depth = static_cast<size_t>(std::count(stage.name.begin(), stage.name.end(), '/'));
    const std::string name =
        std::string(2 * depth, ' ') + stage.name.substr(stage.name.rfind('/') + 1);  // npos + 1 == 0
    fmt::print("  {:<28} {:>9.2f} {:>7.1f} {:>9} {:>7}\n", name, stage.seconds, 100 * stage.seconds / total,
               stage.flops > 0 ? fmt::format("{:.1f}", stage.flops / stage.seconds / 1e9) : "", stage.calls);
  }
}

void print_estimate(const Estimate& estimate, const CommonOptions& common) {
  if (common.json) {
    print_json({{"linear_bytes", estimate.linear_bytes},
                {"dense_bytes", estimate.dense_bytes},
                {"exact", estimate.exact},
                {"peak_memory_bytes", estimate.peak_memory_bytes},
                {"seconds", estimate.seconds}});
    return;
  }
  const std::string kind = estimate.exact ? "exact" : "estimate";
  fmt::print("dry run, nothing was written\n");
  fmt::print("  quantized linears   {} bytes ({})\n  other tensors       {} bytes (exact)\n",
             estimate.linear_bytes, kind, estimate.dense_bytes);
  fmt::print("  file                {} and a header with configuration and tokenizer\n",
             human_bytes(static_cast<double>(estimate.linear_bytes + estimate.dense_bytes)));
  fmt::print("  peak memory         {} (predicted)\n",
             human_bytes(static_cast<double>(estimate.peak_memory_bytes)));
  fmt::print("  time                {:.1f} minutes (from a forward pass and some linears of one block)\n",
             estimate.seconds / 60);
}

/// Refuses to write over what this run reads, even with --force. check_request() looks after -o and the
/// checkpoint.
void check_inputs(const Options& options) {
  std::error_code ignored;  // what is not there is no input
  const std::filesystem::path report = options.report, output = options.quantize.output;
  std::vector<std::string> inputs = {options.recipe, options.plan};
  for (const std::string& text : options.calib) inputs.push_back(CalibrationText::parse(text).data);
  for (const std::string& input : inputs)
    for (const auto& path : {report, output})
      if (std::filesystem::equivalent(path, input, ignored))
        fail(ErrorCode::kUsage, "{}: this run reads it; choose another path to write to", path.string());
  if (!report.empty() && std::filesystem::exists(report, ignored) &&
      std::filesystem::equivalent(std::filesystem::absolute(report).parent_path(), options.checkpoint,
                                  ignored))
    fail(ErrorCode::kUsage,
         "--report {}: this would overwrite a part of the checkpoint itself; choose another path",
         report.string());
}

/// Refuses a report that could not be written at the end of the run.
void check_report(const std::filesystem::path& path, const std::filesystem::path& output, bool force) {
  if (std::filesystem::weakly_canonical(path) == std::filesystem::weakly_canonical(output))
    fail(ErrorCode::kUsage, "--report {}: this is the output itself; choose another path", path.string());
  if (std::filesystem::is_directory(path))
    fail(ErrorCode::kUsage, "--report {}: a directory is there; name a file", path.string());
  if (std::filesystem::exists(path) && !force)
    fail(ErrorCode::kExists, "{}: the report is there already; choose another path or pass --force",
         path.string());
  const std::string probe = fmt::format("{}.probe-{}", path.string(), ::getpid());
  write_text(probe, "");
  std::filesystem::remove(probe);
}

/// What `stbllm plan` wrote.
nlohmann::json read_plan(const std::string& path) {
  const nlohmann::json file = try_parse_json(read_text(path));
  if (file.is_discarded())
    fail(ErrorCode::kUsage, "{}: this is not JSON; look for a comma or a quote that is missing", path);
  if (!file.is_object() || !file.contains("linears"))
    fail(ErrorCode::kUsage, "{}: no plan; expected a file as 'stbllm plan' writes it, with \"linears\"",
         path);
  return file["linears"];
}

/// Refuses a request that could fail later for reasons that are known now.
void check_options(Options& options, const Recipe& recipe, const ProcessGroup& group) {
  if (options.quantize.max_memory < 0) fail(ErrorCode::kUsage, "--max-memory: expected a number above 0");
  if (options.dry_run && group.size() > 1)
    fail(ErrorCode::kUsage, "--dry-run works in one process; leave out WORLD_SIZE");
  if (options.quantize.dense_output && !options.quantize.output.has_filename())
    options.quantize.output = options.quantize.output.parent_path();
  options.quantize.force |= options.dry_run;  // which overwrites nothing
  check_request(options.checkpoint, recipe, options.quantize, group);
  check_inputs(options);
  if (group.rank() != 0 || options.dry_run) return;
  WorkDirectory::check(options.quantize.output, options.quantize.resume, options.quantize.force);
  if (!options.report.empty()) check_report(options.report, options.quantize.output, options.quantize.force);
}

/// How much training --minutes has time for: what an unfinished run that is continued chose, else by the
/// speed of this machine.
TrainingChoice choose_training(Options untrained) {
  const double started = seconds_now();
  const nlohmann::json earlier = WorkDirectory::remembered(untrained.quantize.output);
  if (untrained.quantize.resume && !earlier.is_null()) return earlier;
  untrained.effort = "fast";
  const Recipe recipe = assemble_recipe(untrained);
  check_options(untrained, recipe, {});
  const Checkpoint checkpoint = Checkpoint::open(untrained.checkpoint);
  const Calibration calibration =
      read_calibration(untrained, checkpoint, ModelSpec::from_checkpoint(checkpoint), recipe,
                       untrained.quantize.output.parent_path());
  const Estimate estimate = estimate_quantization(checkpoint, calibration, recipe, untrained.quantize);
  const TrainingChoice choice =
      choose_training(60 * untrained.minutes - (seconds_now() - started), estimate, calibration.training(),
                      std::max<int64_t>(0, calibration.windows_in_texts - std::ssize(calibration.windows)));
  log::info("without training this takes {:.1f} minutes; a window in an epoch of training takes {:.1f} s",
            estimate.seconds / 60, estimate.distilled_window_seconds);
  return choice;
}

/// What --minutes makes of the effort: its own calibration and as much training as there is time for. The
/// same can be asked for by name, and then gives the same bytes on any machine.
void apply_minutes(Options& options) {
  if (options.minutes <= 0) return;
  if (options.samples == 0) options.samples = 64;
  if (options.seqlen == 0) options.seqlen = 512;
  // Writing a window takes about as long as training on it once: a second epoch is the cheaper one.
  options.text_windows = 2 * options.samples;
  const TrainingChoice choice = choose_training(options);
  options.quantize.remember = choice;
  if (choice.epochs == 0) {
    options.effort = "fast";
    log::warn("--minutes {}: there is no time to train; linear algebra alone", options.minutes);
    return;
  }
  options.distill_samples = choice.windows;
  options.fields.insert(options.fields.begin(),
                        {"training.tune=null", fmt::format("training.distill.epochs={}", choice.epochs)});
  log::info(
      "--minutes {}: as --nsamples {} --seqlen {} --distill-nsamples {} --set training.distill.epochs={}",
      options.minutes, options.samples, options.seqlen, choice.windows, choice.epochs);
}

/// The first signal asks the run to stop, the second one stops it at once.
void stop_on_signals() {
  for (const int signal : {SIGINT, SIGTERM})
    std::signal(signal, [](int again) {
      request_interrupt();
      std::signal(again, SIG_DFL);
    });
}

/// What --json prints of a run.
nlohmann::json summary_json(const Options& options, const Recipe& recipe, const Calibration& calibration,
                            const QuantizeResult& result, const MemoryPlan& memory,
                            const std::optional<Ledger>& ledger) {
  nlohmann::json json = {{"output", options.quantize.output.string()},
                         {"recipe", recipe.to_json()},
                         {"calibration", calibration.provenance},
                         {"nominal_bits", result.nominal_bits},
                         {"seconds", result.seconds},
                         {"peak_memory_bytes", peak_memory_bytes()},
                         {"predicted_peak_memory_bytes", memory.peak_bytes},
                         {"verified_logits", result.verified_logits}};
  if (result.distill) json["distill"] = *result.distill;
  if (options.profile) json["stages"] = stages_json(profiled_stages());
  if (ledger) {
    json["stored_bits"] = ledger->stored_bits;
    json["file_bits"] = ledger->file_bits;
    json["file_bytes"] = ledger->file_bytes;
  }
  return json;
}

/// The file behind --report: the summary with a row for each linear and block.
void write_report(const Options& options, nlohmann::json report, const QuantizeResult& result,
                  const std::optional<Ledger>& ledger) {
  report["linears"] = nlohmann::json::array();
  for (const LinearResult& linear : result.linears)
    report["linears"].push_back(to_json(linear, /*with_seconds=*/true));
  report["blocks"] = result.blocks;
  if (ledger) report["ledger"] = to_json(*ledger);
  report["stages"] = stages_json(profiled_stages());
  write_text(options.report, json_text(report));
}

void print_summary(const Options& options, const Calibration& calibration, const QuantizeResult& result,
                   const MemoryPlan& memory, const std::optional<Ledger>& ledger) {
  fmt::print("{}\n", options.quantize.output.string());
  if (ledger)
    fmt::print(
        "  stored bits per weight  {:.4f} (linears, all planes)   {:.4f} (whole file)\n"
        "  nominal bits            {:.4f}\n"
        "  file                    {}\n",
        ledger->stored_bits, ledger->file_bits, result.nominal_bits,
        human_bytes(static_cast<double>(ledger->file_bytes)));
  if (result.distill && result.distill->epochs == 0)
    fmt::print("  divergence              {:.4f} nats per token; training gained nothing and was left out\n",
               result.distill->divergence_before);
  else if (result.distill)
    fmt::print("  divergence              {:.3f} -> {:.3f} nats per token by distillation, on {} windows\n",
               result.distill->divergence_before, result.distill->divergence_after,
               calibration.holdout > 0 ? "held-out" : "the training");
  fmt::print("  time                    {:.1f} s, peak memory {} (predicted {})\n", result.seconds,
             human_bytes(static_cast<double>(peak_memory_bytes())),
             human_bytes(static_cast<double>(memory.peak_bytes)));
  if (options.profile) print_stages(profiled_stages(), result.seconds);
}

void run(Options options) {
  make_products_reproducible();
  apply(options.common);
  options.quantize.compare_blocks = !options.report.empty();
  if (!options.plan.empty()) options.quantize.plan = read_plan(options.plan);
  apply_minutes(options);
  const Recipe recipe = assemble_recipe(options);
  const ProcessGroup group = ProcessGroup::from_environment();
  const bool first = group.rank() == 0;  // the one that prints and writes
  if (!first) log::set_level(log::Level::kWarn);
  check_options(options, recipe, group);
  const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  const Calibration calibration =
      read_calibration(options, checkpoint, spec, recipe, options.quantize.output.parent_path());
  if (options.dry_run) {
    print_estimate(estimate_quantization(checkpoint, calibration, recipe, options.quantize), options.common);
    return;
  }
  const MemoryPlan memory = require_memory(spec, share_of(calibration, group), recipe, options.quantize);
  if (memory.spill)
    log::info("hidden states go to a file, to stay below {} of memory",
              human_bytes(static_cast<double>(memory.limit)));
  std::optional<log::WholeRun> whole;
  if (log::shows(log::Level::kInfo)) {
    whole.emplace(estimate_quantization(checkpoint, calibration, recipe, options.quantize).stages);
    reset_profile();  // which is that of the run alone
  }
  stop_on_signals();  // before this there is nothing to keep, and a signal ends the program at once
  const QuantizeResult result = quantize_model(checkpoint, calibration, recipe, options.quantize, group);
  whole.reset();
  if (!first) return;
  std::optional<Ledger> ledger;
  if (!options.quantize.dense_output) ledger = make_ledger(PackedReader::open(options.quantize.output));
  const nlohmann::json json = summary_json(options, recipe, calibration, result, memory, ledger);
  if (!options.report.empty()) write_report(options, json, result, ledger);
  if (options.common.json)
    print_json(json);
  else
    print_summary(options, calibration, result, memory, ledger);
}

void add_run_options(CLI::App& command, Options& options) {
  CLI::Option* plan = command.add_option(
      "--plan", options.plan, "Give each linear the code that this file says, as 'stbllm plan' writes it");
  for (const char* other : {"--nm", "--target-bpw", "--target-size", "--code", "--keep"})
    plan->excludes(other);
  command
      .add_option(
          "--minutes", options.minutes,
          "Train by distillation for as long as lets the run end after about so many minutes; the log "
          "says by which options the same result is had again")
      ->check(above_zero())
      ->excludes("--effort")
      ->excludes("--distill-nsamples");
  command.add_option("--blocks", options.quantize.blocks, "Quantize only the first K decoder blocks")
      ->check(above_zero())
      ->excludes("--target-size");
  command
      .add_option(
          "--max-memory", options.quantize.max_memory,
          "Bytes (16G, 800M) to stay below: hidden states go to a file beside the output where needed; "
          "default: the memory of the machine")
      ->transform(byte_count());
  command
      .add_option("--device", options.quantize.device,
                  "Where forward passes, Hessians, searches of lean methods and training run")
      ->check(suggest({"cpu", "cuda"}))
      ->capture_default_str();
  command
      .add_flag("--dense", options.quantize.dense_output,
                "Write a HuggingFace directory of dequantized weights instead")
      ->excludes("--target-size");
  command.add_flag("--force", options.quantize.force, "Overwrite the output, discard an unfinished run");
  command.add_flag("--resume", options.quantize.resume, "Continue an unfinished run");
  command.add_option(
      "--report", options.report,
      "Also write a JSON report with a row per linear and block; 'stbllm report' makes a page of it");
  command.add_flag("--profile", options.profile, "Also print the seconds of each stage");
  command.add_flag("--dry-run", options.dry_run,
                   "Print bytes of the result, peak memory and minutes; write nothing");
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("quantize", "Turn a HuggingFace checkpoint into one packed file");
  command->footer(
      "Several processes share the calibration when each is started with the same command and the "
      "environment\n"
      "WORLD_SIZE=<processes> RANK=<0, 1, ..> MASTER_ADDR=<host of rank 0> MASTER_PORT=<port>; rank 0 writes "
      "the result.\n\n" +
      app.get_footer());
  add_checkpoint(*command, *options);
  command->add_option("-o,--output", options->quantize.output, "The packed file to write (.safetensors)")
      ->required();
  add_recipe_options(*command, *options);
  add_calibration_options(*command, *options);
  add_training_options(*command, *options);
  add_run_options(*command, *options);
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
