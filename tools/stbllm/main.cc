// stbllm: structured binary weights for LLaMA, OPT and Mistral checkpoints.

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <omp.h>
#include <sys/resource.h>
#include <torch/csrc/api/include/torch/version.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>

#include "command_tree.h"
#include "commands.h"
#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/base/heap.h"
#include "stbllm/base/log.h"
#include "stbllm/base/mapped_file.h"

namespace stbllm {

void add_common(CLI::App& command, CommonOptions& options) {
  command.add_option("--threads", options.threads, "CPU threads; 0: all cores")->check(CLI::Range(0, 4096));
  command.add_flag("--json", options.json, "Print the result as one JSON object");
}

void add_model(CLI::App& command, std::string& model) {
  command.add_option("model", model, "A packed .safetensors file or a checkpoint directory")->required();
}

void add_runtime(CLI::App& command, std::string& backend, std::string& dtype) {
  command
      .add_option("--backend", backend,
                  "Of packed linears; auto: $STBLLM_BACKEND, else the fastest; a checkpoint runs dense, on "
                  "cuda or not")
      ->check(suggest({"auto", "reference", "cpu", "cpu-generic", "cpu-avx2", "cpu-avxvnni", "cpu-avx512",
                       "cpu-amx", "cpu-neon", "cuda"}))
      ->capture_default_str();
  command
      .add_option(
          "--dtype", dtype,
          "Activations: float32 (exact on the CPU; on cuda products round to 11 bits) or bfloat16 (fast)")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
}

void apply(const CommonOptions& options) {
  if (options.threads <= 0) return;
  at::set_num_threads(options.threads);
  omp_set_num_threads(options.threads);
}

PackedReader open_packed(const std::string& path) {
  if (!std::filesystem::exists(path)) fail(ErrorCode::kNotFound, "{}: no such file", path);
  if (std::filesystem::is_directory(path))
    fail(ErrorCode::kUsage, "{}: expected a packed .safetensors file, found a directory; quantize it first",
         path);
  return PackedReader::open(path);
}

int64_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

std::string human_bytes(double bytes) {
  if (bytes >= 1e9) return fmt::format("{:.2f} GB", bytes / 1e9);
  if (bytes >= 1e6) return fmt::format("{:.1f} MB", bytes / 1e6);
  return fmt::format("{:.1f} kB", bytes / 1e3);
}

std::string json_text(const nlohmann::json& json) {
  return json.dump(1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace) + '\n';
}

void print_json(const nlohmann::json& json) { std::cout << json_text(json); }

namespace {

/// What ran out and what to do, for an allocation that failed.
std::string out_of_memory_message() {
  rlimit limit{};
  getrlimit(RLIMIT_AS, &limit);
  const std::string bound = limit.rlim_cur == RLIM_INFINITY
                                ? ""
                                : fmt::format(" under a limit of {} of address space",
                                              human_bytes(static_cast<double>(limit.rlim_cur)));
  return fmt::format(
      "out of memory: the program held {} when it could get no more{}; free memory or raise the limit, or "
      "ask for "
      "less with fewer or shorter windows (--nsamples, --windows, --seqlen)",
      human_bytes(static_cast<double>(peak_memory_bytes())), bound);
}

/// The program's version and what it was built with and runs on.
std::string version_text() {
  std::string backends;
  for (const std::string_view name : available_backends())
    backends += fmt::format("{}{}", backends.empty() ? "" : ", ", name);
  return fmt::format("stbllm {} ({}), libtorch {}, backends {}, CUDA {}", STBLLM_VERSION, STBLLM_COMMIT,
                     TORCH_VERSION, backends,
#ifdef STBLLM_HAS_CUDA
                     "built in"
#else
                     "not built in"
#endif
  );
}

int run(int argc, char** argv) {
  keep_freed_memory();
  exit_when_mapped_file_is_lost();
  std::signal(SIGXFSZ, SIG_IGN);  // a file that may not grow is an error of its write
  CLI::App app{
      "Structured binary weights (N:M sparse, signs, few scales) for LLaMA, OPT, Mistral and Qwen "
      "checkpoints.\n\n"
      "  stbllm info CHECKPOINT\n"
      "  stbllm quantize CHECKPOINT -o model.safetensors --calib text.txt\n"
      "  stbllm eval-ppl model.safetensors --data wikitext2\n"
      "  stbllm compare CHECKPOINT model.safetensors\n"
      "  stbllm eval-tasks model.safetensors samples_piqa.jsonl --against CHECKPOINT\n"
      "  stbllm inspect model.safetensors\n"
      "  stbllm generate model.safetensors --prompt \"Once upon a time\"\n"
      "  stbllm export model.safetensors DIRECTORY --to hf\n"
      "  stbllm report run.json -o run.html\n"};
  app.set_version_flag("--version", version_text);
  app.set_config("--config", "", "Read options from this file: lines of NAME = VALUE under [SUBCOMMAND]");
  app.allow_config_extras(CLI::config_extras_mode::error);
  app.require_subcommand(1);
  std::string level = "info";
  app.add_option("--log-level", level, "The least grave messages that are shown")
      ->check(suggest({"debug", "info", "warning", "error", "off"}))
      ->capture_default_str();
  bool quiet = false;
  app.add_flag("-q,--quiet", quiet, "No progress and no messages but warnings and errors")
      ->excludes("--log-level");
  app.fallthrough();
  app.parse_complete_callback([&] { log::set_level(quiet ? log::Level::kWarn : log::parse_level(level)); });
  app.footer(
      "Exit codes: 0 done, 1 unexpected fault, 2 usage, 3 not found, 4 damaged file, 5 parts do not match, 6 "
      "not supported, 7 text too short,\n"
      "8 output exists, 9 cannot write, 10 verification failed, 11 out of memory, 130 interrupted.");
  add_info(app);
  add_plan(app);
  add_quantize(app);
  add_eval_ppl(app);
  add_compare(app);
  add_eval_tasks(app);
  add_inspect(app);
  add_generate(app);
  add_write_text(app);
  add_export(app);
  add_report(app);
  add_completion(app);
  add_man(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    fail(ErrorCode::kUsage, "{}; --help explains", error.what());
  }
  if (std::fflush(stdout) != 0 || !std::cout.flush())
    fail(ErrorCode::kWriteFailed,
         "the result cannot be written to the standard output; check where it leads");
  return 0;
}

}  // namespace
}  // namespace stbllm

int main(int argc, char** argv) {
  try {
    return stbllm::run(argc, argv);
  } catch (const stbllm::Error& error) {
    stbllm::log::write(stbllm::log::Level::kError, error.what());
    return static_cast<int>(error.code());
  } catch (const std::filesystem::filesystem_error& error) {
    stbllm::log::write(stbllm::log::Level::kError,
                       fmt::format("{}: {}; check the path", error.path1().string(), error.code().message()));
    return static_cast<int>(stbllm::ErrorCode::kNotFound);
  } catch (const std::bad_alloc&) {
    stbllm::log::write(stbllm::log::Level::kError, stbllm::out_of_memory_message());
    return static_cast<int>(stbllm::ErrorCode::kOutOfMemory);
  } catch (const c10::Error& error) {
    // libtorch has no class of its own for memory of the CPU that could not be had.
    if (std::string_view(error.what_without_backtrace()).find("can't allocate memory") !=
        std::string_view::npos) {
      stbllm::log::write(stbllm::log::Level::kError, stbllm::out_of_memory_message());
      return static_cast<int>(stbllm::ErrorCode::kOutOfMemory);
    }
    stbllm::log::write(stbllm::log::Level::kError,
                       std::string("unexpected: ") + error.what_without_backtrace());
  } catch (const std::exception& error) {
    // oneDNN writes its kernels when they are first used. Where it cannot, memory for them could not be had:
    // the operations that this program asks for exist on every processor.
    if (std::string_view(error.what()).starts_with("could not create a primitive")) {
      stbllm::log::write(stbllm::log::Level::kError, stbllm::out_of_memory_message());
      return static_cast<int>(stbllm::ErrorCode::kOutOfMemory);
    }
    stbllm::log::write(stbllm::log::Level::kError, std::string("unexpected: ") + error.what());
  }
  return 1;
}
