// The last stage. It reads the finished blocks and leaves the output under its name.

#include "stages.h"
#include "stbllm/base/heap.h"
#include "stbllm/base/profile.h"
#include "stbllm/run/assemble.h"
#include "stbllm/text/overlap.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

/// What is compared after packing: the logits of so many windows' first tokens.
constexpr size_t kVerifiedWindows = 2, kVerifiedTokens = 512;

/// What a reader of the packed file may want to know.
void add_metadata(PackedWriter& file, const Run& run) {
  const auto& [checkpoint, calibration, recipe, options, group] = run.request;
  nlohmann::json results = nlohmann::json::array();
  for (const LinearResult& linear : run.result.linears)
    results.push_back(to_json(linear, /*with_seconds=*/false));
  file.set_metadata("config", checkpoint.config().dump());
  file.set_metadata("tokenizer", Tokenizer::load(checkpoint.directory())->serialize());
  file.set_metadata("recipe", recipe.to_json().dump());
  nlohmann::json provenance = calibration.provenance;
  provenance["marks"] = marks_of(calibration.windows);
  file.set_metadata("calibration", provenance.dump());
  file.set_metadata("results", results.dump());
  file.set_metadata("version", STBLLM_VERSION);
}

Windows verified_windows(const Windows& all) {
  Windows windows(all.begin(), all.begin() + std::min(kVerifiedWindows, all.size()));
  for (auto& window : windows) window.resize(std::min(window.size(), kVerifiedTokens));
  return windows;
}

}  // namespace

void write_result(Run& run) {
  run.dense.reset();
  release_freed_memory();  // verification wants blocks of other sizes
  const QuantizeOptions& options = run.request.options;
  const Assembly assembly{.checkpoint = run.request.checkpoint,
                          .spec = run.spec(),
                          .tables = run.tables,
                          .quantized_blocks = run.blocks(),
                          .quantized = [&](int64_t i) { return run.finished_block(i); }};
  if (options.dense_output) {
    export_dense(options.output, assembly);
    return;
  }
  PackedWriter file(options.output, options.force, run.work->path());
  write_packed(file, assembly);
  add_metadata(file, run);
  const std::filesystem::path finished = file.finish();
  const StageTimer timer("verify");
  run.result.verified_logits =
      verify_packed(finished, assembly, verified_windows(run.request.calibration.windows));
  file.commit();
}

}  // namespace stbllm
