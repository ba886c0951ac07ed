#pragma once
// The subcommands. Each file holds an options struct, add_*() that describes it to CLI11, and run().

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/pack/packed_file.h"

namespace stbllm {

void add_quantize(CLI::App& app);
void add_plan(CLI::App& app);
void add_info(CLI::App& app);
void add_eval_ppl(CLI::App& app);
void add_compare(CLI::App& app);
void add_eval_tasks(CLI::App& app);
void add_inspect(CLI::App& app);
void add_generate(CLI::App& app);
void add_write_text(CLI::App& app);
void add_report(CLI::App& app);
void add_export(CLI::App& app);
void add_completion(CLI::App& app);
void add_man(CLI::App& app);

/// What several subcommands share.
struct CommonOptions {
  int threads = 0;    ///< 0: all cores
  bool json = false;  ///< result as one JSON object on stdout
};
void add_common(CLI::App& command, CommonOptions& options);
/// MODEL, --backend and --dtype of the commands that run one.
void add_model(CLI::App& command, std::string& model);
void add_runtime(CLI::App& command, std::string& backend, std::string& dtype);
void apply(const CommonOptions& options);

/// The packed file that a command was given. Throws Error(kNotFound), Error(kUsage) for a directory, and as
/// PackedReader::open().
PackedReader open_packed(const std::string& path);
/// Highest resident memory of this process so far, in bytes.
int64_t peak_memory_bytes();
std::string human_bytes(double bytes);
/// `json` with a line break behind it. Bytes that are not UTF-8, such as those of a path, become U+FFFD.
std::string json_text(const nlohmann::json& json);
void print_json(const nlohmann::json& json);

}  // namespace stbllm
