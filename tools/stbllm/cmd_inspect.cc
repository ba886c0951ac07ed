#include <fmt/format.h>

#include <iostream>

#include "commands.h"
#include "stbllm/pack/ledger.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {
namespace {

struct Options {
  std::string model;
  bool verify = false;
  CommonOptions common;
};

/// A string of an object that may be another value.
std::string text_in(const nlohmann::json& object, const char* key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_string() ? found->get<std::string>() : "?";
}

void run(const Options& options) {
  const PackedReader reader = open_packed(options.model);
  if (options.verify) reader.verify_checksums();
  const Ledger ledger = make_ledger(reader);
  const nlohmann::json recipe = reader.remark("recipe"), calibration = reader.remark("calibration");
  if (options.common.json) {
    nlohmann::json json = to_json(ledger);
    json["recipe"] = recipe;
    json["calibration"] = calibration;
    json["version"] = reader.remark("version");
    json["verified"] = options.verify;
    print_json(json);
    return;
  }
  fmt::print("{}  (recipe {}, calibrated on {})\n\n", options.model, text_in(recipe, "name"),
             text_in(calibration, "corpus"));
  fmt::print("{:<44} {:>11} {:>6} {:>3} {:>5} {:>8} {:>8} {:>9} {:>9}\n", "linear", "shape", "N:M", "L",
             "extra", "nominal", "stored", "error", "held out");
  for (const LinearEntry& entry : ledger.linears)
    fmt::print("{:<44} {:>11} {:>6} {:>3} {:>5} {:>8.4f} {:>8.4f} {:>9.5f} {:>9.5f}\n", entry.name,
               fmt::format("{}x{}", entry.layout.rows, entry.layout.cols), entry.layout.nm.str(),
               entry.layout.levels, entry.layout.salient + entry.layout.outliers, entry.nominal_bits,
               entry.stored_bits, entry.output_error, entry.holdout_error);
  int64_t kept_bytes = 0;
  for (const KeptLinear& linear : ledger.kept_linears) {
    kept_bytes += linear.bytes;
    fmt::print("{:<44} {:>11} {:>6}\n", linear.name, fmt::format("{}x{}", linear.rows, linear.cols), "kept");
  }
  fmt::print("\n{:<24} {:>14} {:>12}\n", "plane", "bytes", "bits/weight");
  for (const auto& [name, bytes] : ledger.plane_bytes)
    fmt::print("{:<24} {:>14} {:>12.4f}\n", name, bytes,
               8.0 * static_cast<double>(bytes) / static_cast<double>(ledger.linear_weights));
  fmt::print("{:<24} {:>14} {:>12.4f}   nominal {:.4f}, kept {:.4f}\n", "quantized linears",
             ledger.linear_bytes, ledger.stored_bits, ledger.nominal_bits, ledger.density);
  if (kept_bytes > 0) fmt::print("{:<24} {:>14}\n", "kept linears", kept_bytes);
  fmt::print("{:<24} {:>14}\n", "embedding, norms, ...", ledger.dense_bytes - kept_bytes);
  fmt::print("{:<24} {:>14} {:>12.4f}   of {} parameters\n", "file", ledger.file_bytes, ledger.file_bits,
             ledger.parameters);
  if (options.verify) fmt::print("checksums of all tensors agree\n");
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "What is in a packed file, bit by bit");
  command->add_option("model", options->model, "A packed .safetensors file")->required();
  command->add_flag("--verify", options->verify, "Recompute the checksum of every tensor");
  add_common(*command, options->common);
  command->callback([options] { run(*options); });
}

}  // namespace stbllm
