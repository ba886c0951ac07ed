#include "stbllm/run/quantize_model.h"

#include <ATen/core/grad_mode.h>

#include "stages.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

QuantizeResult run_stages(const Request& request) {
  const double started = seconds_now();
  const at::NoGradGuard no_grad;
  Run run = open_run(request);
  make_plan(run);
  quantize_blocks(run);
  if (!run.work) return run.result;  // process 0 does the rest
  distill_blocks(run);
  write_result(run);
  run.work->remove();
  run.result.seconds = seconds_now() - started;
  return run.result;
}

}  // namespace

Plan plan_quantization(const Checkpoint& checkpoint, const Calibration& calibration, const Recipe& recipe,
                       const QuantizeOptions& options) {
  const at::NoGradGuard no_grad;
  const ProcessGroup alone;
  Run run = open_run({.checkpoint = checkpoint,
                      .calibration = calibration,
                      .recipe = recipe,
                      .options = options,
                      .group = alone});
  make_plan(run);
  return run.plan;
}

QuantizedBlock Run::finished_block(int64_t index) const {
  return distilled.empty() ? work->load(index).value() : distilled[index];
}

QuantizeResult quantize_model(const Checkpoint& checkpoint, const Calibration& calibration,
                              const Recipe& recipe, const QuantizeOptions& options,
                              const ProcessGroup& group) {
  try {
    return run_stages({.checkpoint = checkpoint,
                       .calibration = calibration,
                       .recipe = recipe,
                       .options = options,
                       .group = group});
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kInterrupted) throw;
    const std::filesystem::path work = work_path(options.output);
    fail(ErrorCode::kInterrupted, "{}; {}", error.what(),
         std::filesystem::exists(work) ? work.string() + " holds what is finished, continue with --resume"
                                       : "no block was finished, nothing is left");
  }
}

}  // namespace stbllm
