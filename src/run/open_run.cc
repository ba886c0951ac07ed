// The first stage. It reads the request and leaves a run whose streams stand in front of block 0. The work
// directory keeps the fingerprint of the run.

#include "stages.h"
#include "stbllm/calibrate/head_hessian.h"
#include "stbllm/run/fingerprint.h"
#include "stbllm/run/memory.h"
#include "stbllm/run/tables.h"

namespace stbllm {
namespace {

std::unique_ptr<WorkDirectory> open_work_directory(const Request& request, const ModelSpec& spec) {
  const auto& [checkpoint, calibration, recipe, options, group] = request;
  if (options.plan_only) return nullptr;
  const nlohmann::json fingerprint = fingerprint_of(checkpoint, spec, recipe, calibration, options, group);
  std::unique_ptr<WorkDirectory> work;
  if (group.rank() == 0)
    work = std::make_unique<WorkDirectory>(options.output, fingerprint, options.resume, options.force);
  if (work != nullptr && !options.remember.is_null()) work->remember(options.remember);
  check_same_inputs(fingerprint, options, group);
  return work;
}

}  // namespace

Run open_run(const Request& request) {
  const auto& [checkpoint, calibration, recipe, options, group] = request;
  check_request(checkpoint.directory(), recipe, options, group);
  const Calibration share = share_of(calibration, group);
  const at::Device device = calibration_device(options);
  StreamOptions stream{.dtype = kHiddenDtype, .holdout = share.holdout};
  if (require_memory(ModelSpec::from_checkpoint(checkpoint), share, recipe, options).spill)
    stream.spill_directory = std::filesystem::absolute(options.output).parent_path();
  Decoder decoder =
      Decoder::from_checkpoint(checkpoint, {.product_dtype = fast_product_dtype(device), .device = device});
  const ModelSpec& spec = decoder.spec();
  check_windows(spec, calibration.windows);
  check_plan(spec, recipe, options);
  std::unique_ptr<WorkDirectory> work = open_work_directory(request, spec);

  const std::span<const std::vector<int32_t>> windows = share.windows;
  std::optional<HiddenStream> dense;
  if (needs_dense_stream(recipe, options)) {
    // Distillation sees more windows than calibration does.
    StreamOptions of_dense = stream;
    if (recipe.training.distill) of_dense.extra = share.distill_only;
    dense.emplace(decoder, ids_of(recipe.training.distill ? windows : windows.subspan(share.distill_only)),
                  of_dense);
  }
  // From here on the tables at both ends are what the packed file will hold.
  StoredTables tables(
      decoder, recipe.model,
      needs_head_hessian(spec, recipe.model) ? head_hessian(decoder, calibration) : at::Tensor());
  tables.install(decoder);
  HiddenStream quantized(decoder, ids_of(windows.subspan(share.distill_only)), stream);
  return {.request = request,
          .decoder = std::move(decoder),
          .tables = std::move(tables),
          .work = std::move(work),
          .dense = std::move(dense),
          .quantized = std::move(quantized),
          .plan = {},
          .distilled = {},
          .result = {}};
}

}  // namespace stbllm
