#include <fmt/format.h>

#include "commands.h"
#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"
#include "stbllm/export/export_gguf.h"
#include "stbllm/export/export_hf.h"
#include "stbllm/export/flip_signs.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string model, output, format, dtype = "float32", type = "tq2_0";
  bool dequantize = false, force = false;
  double flip_signs = 0;
  uint64_t seed = 0;
  CommonOptions common;
};

/// Throws where the output cannot or may not be written.
void check_output(const Options& options, bool directory) {
  std::error_code ignored;
  const fs::path output = options.output;
  if (!fs::exists(fs::symlink_status(output, ignored))) return;
  if (fs::is_directory(output) != directory)
    fail(ErrorCode::kUsage, "{}: a {} is there, and --to {} writes a {}; choose another path", options.output,
         directory ? "file" : "directory", options.format, directory ? "directory" : "file");
  if (fs::equivalent(output, options.model, ignored))
    fail(ErrorCode::kUsage, "{}: this would overwrite the packed file itself; choose another path",
         options.output);
  if (!options.force) refuse_existing_output(output);
}

nlohmann::json write_hf(const Options& options, const PackedReader& packed) {
  export_hf(packed, options.output, options.dtype);
  if (!options.common.json) fmt::print("{}: a checkpoint in {}\n", options.output, options.dtype);
  return {{"dtype", options.dtype}};
}

nlohmann::json write_gguf(const Options& options, const PackedReader& packed) {
  const GgufType type = options.type == "tq1_0" ? GgufType::kTQ1_0 : GgufType::kTQ2_0;
  const GgufSummary summary = export_gguf(
      packed, options.output, {.ternary = type, .dequantize = options.dequantize, .force = options.force});
  nlohmann::json linears = nlohmann::json::object();
  std::string text;
  for (const auto& [of, count] : summary.linears) {
    linears[std::string(gguf_type_name(of))] = count;
    text += fmt::format(", {} linears in {}", count, gguf_type_name(of));
  }
  if (!options.common.json)
    fmt::print("{}: {}{}\n", options.output, human_bytes(static_cast<double>(summary.bytes)), text);
  return {{"bytes", summary.bytes}, {"linears", linears}};
}

nlohmann::json write_packed(const Options& options, const PackedReader& packed) {
  const FlippedSigns signs =
      flip_signs(packed, options.output, options.flip_signs, options.seed, options.force);
  if (!options.common.json)
    fmt::print("{}: {} of {} signs flipped\n", options.output, signs.flipped, signs.kept);
  return {{"signs", signs.kept}, {"flipped", signs.flipped}};
}

void run(const Options& options) {
  apply(options.common);
  const PackedReader packed = open_packed(options.model);
  const bool hf = options.format == "hf";
  if (options.flip_signs > 0 && options.format != "packed")
    fail(ErrorCode::kUsage, "--flip-signs goes with --to packed; export that file to {} then",
         options.format);
  check_output(options, hf);
  packed.verify_checksums();
  nlohmann::json result = hf                           ? write_hf(options, packed)
                          : options.format == "packed" ? write_packed(options, packed)
                                                       : write_gguf(options, packed);
  result.update({{"model", options.model}, {"output", options.output}, {"format", options.format}});
  if (options.common.json) print_json(result);
}

}  // namespace

void add_export(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("export", "A packed file as a HuggingFace checkpoint or as GGUF for llama.cpp");
  command->add_option("model", options->model, "A packed .safetensors file")->required();
  command->add_option("output", options->output, "A directory (hf) or a file")->required();
  command
      ->add_option("--to", options->format,
                   "hf: a dense checkpoint; gguf: ternary linears, bit for bit; packed: with --flip-signs")
      ->check(CLI::IsMember({"hf", "gguf", "packed"}))
      ->required();
  command
      ->add_option("--dtype", options->dtype,
                   "hf: of the weights; float32 holds them exactly, bfloat16 and float16 round")
      ->check(CLI::IsMember({"float32", "bfloat16", "float16"}))
      ->capture_default_str();
  command
      ->add_option("--type", options->type,
                   "gguf: of the linears; tq1_0 takes 1.69 bits per weight, tq2_0 2.06 and runs faster")
      ->check(CLI::IsMember({"tq1_0", "tq2_0"}))
      ->capture_default_str();
  command->add_flag("--dequantize", options->dequantize,
                    "gguf: write linears that are not ternary as F16 instead of refusing them");
  command
      ->add_option("--flip-signs", options->flip_signs,
                   "packed: flip so large a share (0 to 1) of the signs of kept weights, to see what the "
                   "model bears")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--seed", options->seed, "packed: which signs are flipped")->capture_default_str();
  command->add_flag("--force", options->force, "Replace an output that is there");
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
