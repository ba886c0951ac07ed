#include "quantize_request.h"

#include <algorithm>
#include <cmath>

#include "command_tree.h"
#include "self_text.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/run/estimate.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

/// The text that the checkpoint writes itself.
constexpr const char* kSelf = "self";

/// "method.descend=2": the value is JSON where it parses as such, else a string. Returns the field's path.
std::string assign_field(nlohmann::json& recipe, const std::string& assignment) {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0)
    fail(ErrorCode::kUsage, "--set {}: expected FIELD=VALUE", assignment);
  if (find_invalid_utf8(assignment) != std::string::npos)
    fail(ErrorCode::kUsage, "--set {}...: expected UTF-8", assignment.substr(0, equals));
  const std::string text = assignment.substr(equals + 1);
  const auto value = try_parse_json(text);
  const std::string path = assignment.substr(0, equals);
  set_field(recipe, path, value.is_discarded() ? nlohmann::json(text) : value);
  return path;
}

/// What --effort makes of the recipe and of the calibration; what was asked for by name stays.
void apply_effort(QuantizeRequest& request, nlohmann::json& recipe) {
  const bool best = request.effort == "best";
  // Training forgets what it does not see: it wants many short windows rather than few long ones.
  if (request.distill_samples < 0) request.distill_samples = best && request.samples == 0 ? 480 : 0;
  if (request.samples == 0) request.samples = best ? 96 : 16;
  if (request.seqlen == 0) request.seqlen = best ? 512 : 2048;
  nlohmann::json& training = recipe["training"];
  if (request.effort == "fast") training = {{"tune", nullptr}, {"distill", nullptr}};
  if (!best) return;
  for (const char* stage : {"tune", "distill"})
    if (training[stage].is_null()) training[stage] = nlohmann::json::object();  // with its defaults
}

/// Text that stands in for a calibration corpus when none was named: never the evaluation split.
std::string default_calibration() {
  for (const char* name : {"c4", "wikitext2-valid"}) try {
      read_corpus(name);
      return name;
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kNotFound) throw;
    }
  fail(ErrorCode::kUsage,
       "no calibration text: pass --calib FILE, or put c4-sample.txt or wiki.valid.raw into $STBLLM_DATA");
}

/// --code GLOB=3:8 and --keep GLOB as rules of the recipe, behind its own.
void add_rules(nlohmann::json& model, const QuantizeRequest& request) {
  for (const std::string& code : request.codes) {
    const size_t equals = code.rfind('=');
    if (equals == std::string::npos || equals == 0)
      fail(ErrorCode::kUsage, "--code {}: expected GLOB=N:M, such as '*.down_proj=3:4x2'", code);
    model["rules"].push_back({{"linears", code.substr(0, equals)}, {"code", code.substr(equals + 1)}});
  }
  for (const std::string& glob : request.keeps)
    model["rules"].push_back({{"linears", glob}, {"code", "keep"}});
}

}  // namespace

void add_checkpoint(CLI::App& command, QuantizeRequest& request) {
  command.add_option("checkpoint", request.checkpoint, "Directory with config.json, weights and tokenizer")
      ->required();
}

void add_recipe_options(CLI::App& command, QuantizeRequest& request) {
  std::vector<std::string> recipes = Recipe::preset_names();
  recipes.emplace_back("FILE");
  command.add_option("--recipe", request.recipe, "A preset, or a .json file like those in configs/")
      ->check(suggest(recipes))
      ->capture_default_str();
  command
      .add_option("--nm", request.nm, "N:M, kept of every group, such as 2:4 or 4:8; overrides the recipe")
      ->type_name("CODE");
  command
      .add_option("--target-bpw", request.target_bits,
                  "Choose the scheme of each linear so that they store at most so many bits per weight, "
                  "everything counted")
      ->check(above_zero())
      ->excludes("--nm");
  command
      .add_option("--target-size", request.target_size,
                  "The same for a file of at most so many bytes (90M, 2G)")
      ->transform(byte_count())
      ->check(above_zero())
      ->excludes("--target-bpw")
      ->excludes("--nm");
  command
      .add_option(
          "--code", request.codes,
          "GLOB=N:M or GLOB=N:Mx2, x3: what the linears with these names get, whatever the recipe and "
          "the budget say: --code '*.down_proj=3:4x2'; of several the last one counts")
      ->type_name("GLOB=CODE")
      ->allow_extra_args(false);
  command.add_option("--keep", request.keeps, "GLOB: linears that keep the checkpoint's weights")
      ->type_name("GLOB")
      ->allow_extra_args(false);
  command
      .add_option("--set", request.fields,
                  "Override a field of the recipe: --set method.descend=2 --set training.tune.epochs=1")
      ->type_name("FIELD=VALUE");
}

void add_calibration_options(CLI::App& command, QuantizeRequest& request) {
  command
      .add_option(
          "--calib", request.calib,
          "Calibration text: 'self' (what the model writes), 'c4', 'wikitext2-valid' or a file (.txt, .raw, "
          ".jsonl, .jsonl.gz); "
          "default: c4, else wikitext2-valid. Several times: --calib c4=3 --calib "
          "notes.txt takes three windows of the first for one of the second")
      ->check(suggest({"self", "c4", "wikitext2-valid", "FILE"}))
      ->allow_extra_args(false);
  command
      .add_option("--nsamples", request.samples,
                  "Calibration windows; default 16, with --minutes 64, best effort 96")
      ->check(above_zero());
  command
      .add_option("--seqlen", request.seqlen,
                  "Tokens per window, at most the model's positions; default 2048, best effort and --minutes "
                  "512")
      ->check(above_zero());
  command.add_option("--seed", request.seed, "Of the windows' places")->capture_default_str();
}

void add_training_options(CLI::App& command, QuantizeRequest& request) {
  command
      .add_option("--effort", request.effort,
                  "fast: linear algebra alone; default: what the recipe says; best: also tune and distil "
                  "(--dry-run predicts the minutes)")
      ->check(CLI::IsMember({"fast", "default", "best"}))
      ->capture_default_str();
  command
      .add_option("--distill-nsamples", request.distill_samples,
                  "Windows beside those that only distillation sees; default 480 for best effort without "
                  "--nsamples, else 0")
      ->check(zero_or_more());
}

Recipe assemble_recipe(QuantizeRequest& request) {
  if (request.target_size < 0 || !std::isfinite(request.target_bits))
    fail(ErrorCode::kUsage, "--target-size and --target-bpw: expected numbers above 0");
  nlohmann::json recipe = Recipe::load(request.recipe).to_json();
  nlohmann::json& model = recipe["model"];
  add_rules(model, request);
  std::vector<std::string> asked_for;
  if (!request.nm.empty()) {
    if (model["allocation"] == "budget") model["allocation"] = "uniform";  // a budget knows no N:M
    model["nm"] = request.nm;
  }
  const bool more_asked_for = request.distill_samples > 0;
  apply_effort(request, recipe);
  for (const std::string& assignment : request.fields) asked_for.push_back(assign_field(recipe, assignment));
  if (request.target_size > 0) {
    const ModelPolicy policy = Recipe::from_json(recipe, &asked_for).model;
    request.target_bits = bits_for_file(Checkpoint::open(request.checkpoint), policy, request.target_size);
  }
  if (request.target_bits > 0) {
    const Recipe plain = Recipe::from_json(recipe, &asked_for);
    const auto* lean = std::get_if<LeanMethod>(&plain.method);
    if (lean == nullptr || lean->scale_bits == 16)
      fail(ErrorCode::kUsage,
           "--target-bpw and --target-size do not go with recipe {}, which gives all linears one code; take "
           "--nm, or a recipe like stbllm-2bit",
           request.recipe);
  }
  if (request.target_bits > 0) model.update({{"allocation", "budget"}, {"target_bpw", request.target_bits}});
  const Recipe result = Recipe::from_json(recipe, &asked_for);
  if (!result.training.distill) {
    if (more_asked_for)
      fail(
          ErrorCode::kUsage,
          "--distill-nsamples {}: nothing is distilled; add --effort best or --set training.distill.epochs=1",
          request.distill_samples);
    request.distill_samples = 0;
  }
  return result;
}

Calibration read_calibration(const QuantizeRequest& request, const Checkpoint& checkpoint,
                             const ModelSpec& spec, const Recipe& recipe,
                             const std::filesystem::path& directory) {
  std::vector<CalibrationText> texts;
  for (const std::string& text : request.calib) texts.push_back(CalibrationText::parse(text));
  if (texts.empty()) texts.push_back({.data = default_calibration()});
  const int64_t seqlen = std::min(request.seqlen, spec.max_positions);
  if (seqlen < request.seqlen) log::info("windows of {} tokens, as many as the model has positions", seqlen);
  const int64_t windows = std::max(request.text_windows, request.samples + request.distill_samples);
  bool written = false;
  for (CalibrationText& text : texts)
    if (text.data == kSelf) {
      written = true;
      const auto share =
          static_cast<int64_t>(std::ceil(static_cast<double>(windows) * text.weight / total_weight(texts)));
      // What is decoded and encoded again has a few tokens less or more, and windows begin at a random place.
      text.data = self_text(checkpoint, directory, (share + 1) * seqlen * 17 / 16).string();
    }
  Calibration calibration =
      make_calibration(checkpoint, texts, request.samples, request.distill_samples, seqlen, request.seed);
  if (std::ssize(calibration.windows) > calibration.windows_in_texts)
    log::warn("{} windows of {} tokens are more than the {} that the text holds: they overlap",
              calibration.windows.size(), seqlen, calibration.windows_in_texts);
  // What the model writes is as long as it was asked for, and more windows would ask for more.
  if (written) calibration.windows_in_texts = std::min(calibration.windows_in_texts, windows);
  log::info("{}: {} blocks, {:.1f} M weights in linears; recipe {}; calibration {} x {} tokens of {}",
            request.checkpoint, spec.layers, static_cast<double>(spec.linear_weights()) / 1e6, recipe.name,
            request.distill_samples > 0 ? fmt::format("{} + {}", request.samples, request.distill_samples)
                                        : std::to_string(request.samples),
            seqlen, calibration.provenance["corpus"].get<std::string>());
  return calibration;
}

}  // namespace stbllm
