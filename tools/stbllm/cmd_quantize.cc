#include <fmt/format.h>

#include <fstream>
#include <iostream>

#include "commands.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/pipeline/ledger.h"
#include "stbllm/pipeline/quantize_model.h"
#include "stbllm/pipeline/work_directory.h"
#include "stbllm/text/corpus.h"

namespace stbllm {
namespace {

struct Options {
  std::string checkpoint, recipe = "stbllm", calib, nm, report;
  std::vector<std::string> fields;
  int64_t samples = 16, seqlen = 2048;
  uint64_t seed = 0;
  QuantizeOptions quantize;
  CommonOptions common;
};

/// "descend=2": the value is JSON where it parses as such, else a string.
void set_field(nlohmann::json& recipe, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0) fail(ErrorCode::kUsage, "--set {}: expected FIELD=VALUE", assignment);
  const std::string text = assignment.substr(equals + 1);
  const auto value = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  recipe[assignment.substr(0, equals)] = value.is_discarded() ? nlohmann::json(text) : value;
}

/// Text that stands in for a calibration corpus when none was named: never the evaluation split.
std::string default_calibration() {
  for (const char* name : {"c4", "wikitext2-valid"}) try {
      read_corpus(name);
      return name;
    } catch (const Error&) {
    }
  fail(ErrorCode::kUsage, "no calibration text: pass --calib FILE, or put c4-sample.txt or wiki.valid.raw into $STBLLM_DATA");
}

void run(const Options& options) {
  apply(options.common);
  nlohmann::json fields = Recipe::load(options.recipe).to_json();
  if (!options.nm.empty()) fields["nm"] = options.nm;
  for (const std::string& assignment : options.fields) set_field(fields, assignment);
  const Recipe recipe = Recipe::from_json(fields);
  if (std::filesystem::exists(options.quantize.output) && !options.quantize.force)
    fail(ErrorCode::kExists, "{}: the output is there already; choose another path or pass --force", options.quantize.output.string());
  const Checkpoint checkpoint = Checkpoint::open(options.checkpoint);
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  const std::string calib = options.calib.empty() ? default_calibration() : options.calib;
  const int64_t seqlen = std::min(options.seqlen, spec.max_positions);
  const Calibration calibration = make_calibration(checkpoint, calib, options.samples, seqlen, options.seed);
  log::info("{}: {} blocks, {:.1f} M weights in linears; recipe {}; calibration {} x {} tokens of {}", options.checkpoint, spec.layers,
            static_cast<double>(spec.linear_weights()) / 1e6, recipe.name, options.samples, seqlen,
            calibration.provenance["corpus"].get<std::string>());
  const QuantizeResult result = quantize_model(checkpoint, calibration, recipe, options.quantize);

  nlohmann::json json = {{"output", options.quantize.output.string()},
                         {"recipe", recipe.to_json()},
                         {"calibration", calibration.provenance},
                         {"nominal_bits", result.nominal_bits},
                         {"seconds", result.seconds},
                         {"peak_memory_bytes", peak_memory_bytes()},
                         {"verified_logits", result.verified_logits}};
  if (!options.quantize.dense_output) {
    const Ledger ledger = make_ledger(PackedReader::open(options.quantize.output));
    json["stored_bits"] = ledger.stored_bits;
    json["file_bits"] = ledger.file_bits;
    json["file_bytes"] = ledger.file_bytes;
  }
  if (!options.report.empty()) {
    nlohmann::json report = json;
    report["linears"] = nlohmann::json::array();
    for (const LinearResult& linear : result.linears) report["linears"].push_back(to_json(linear, /*with_seconds=*/true));
    std::ofstream file(options.report);
    file << report.dump(1) << '\n';
    if (!file) fail(ErrorCode::kWriteFailed, "{}: cannot write the report", options.report);
  }
  if (options.common.json) {
    std::cout << json.dump(1) << '\n';
    return;
  }
  fmt::print("{}\n", options.quantize.output.string());
  if (!options.quantize.dense_output)
    fmt::print("  stored bits per weight  {:.4f} (linears, all planes)   {:.4f} (whole file)\n  nominal bits            {:.4f}\n  file                    {}\n",
               json["stored_bits"].get<double>(), json["file_bits"].get<double>(), result.nominal_bits,
               human_bytes(json["file_bytes"].get<double>()));
  fmt::print("  time                    {:.1f} s, peak memory {}\n", result.seconds, human_bytes(static_cast<double>(peak_memory_bytes())));
}

}  // namespace

void add_quantize(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("quantize", "Turn a HuggingFace checkpoint into one packed file");
  command->add_option("checkpoint", options->checkpoint, "Directory with config.json, weights and tokenizer")->required();
  command->add_option("-o,--output", options->quantize.output, "The packed file to write (.safetensors)")->required();
  std::string names;
  for (const std::string& name : Recipe::preset_names()) names += (names.empty() ? "" : ", ") + name;
  command->add_option("--recipe", options->recipe, "A preset (" + names + ") or a .json file like those in configs/")->capture_default_str();
  command->add_option("--nm", options->nm, "N:M, kept of every group, such as 2:4 or 4:8; overrides the recipe");
  command->add_option("--set", options->fields, "Override a field of the recipe: --set descend=2 --set shrink=0.3");
  command->add_option("--calib", options->calib, "Calibration text: a file (.txt, .raw, .jsonl, .jsonl.gz), 'c4' or 'wikitext2-valid'");
  command->add_option("--nsamples", options->samples, "Calibration windows")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--seqlen", options->seqlen, "Tokens per window, at most the model's positions")->check(CLI::PositiveNumber)->capture_default_str();
  command->add_option("--seed", options->seed, "Of the windows' places")->capture_default_str();
  command->add_option("--blocks", options->quantize.blocks, "Quantize only the first K decoder blocks");
  command->add_flag("--dense", options->quantize.dense_output, "Write a HuggingFace directory of dequantized weights instead");
  command->add_flag("--force", options->quantize.force, "Overwrite the output, discard an unfinished run");
  command->add_flag("--resume", options->quantize.resume, "Continue an unfinished run");
  command->add_option("--report", options->report, "Also write a JSON report with a row per linear");
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
