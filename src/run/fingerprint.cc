#include "stbllm/run/fingerprint.h"

#include <ATen/ATen.h>

#include "stbllm/base/checksum.h"
#include "stbllm/base/error.h"
#include "stbllm/base/mapped_file.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/model/linear.h"

namespace stbllm {
namespace {

/// Of a large weight every so many-th row is read: enough to tell models of one shape apart.
constexpr int64_t kRowsApart = 64;

/// Of the executable: another build may round otherwise.
std::string program_checksum() { return checksum(MappedFile::open("/proc/self/exe")->bytes()); }

}  // namespace

std::string weights_checksum(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::string sums;
  const auto add = [&](const TensorSpec& tensor, int64_t rows_apart) {
    const at::Tensor loaded = checkpoint.load(tensor.name, tensor.shape);
    sums += checksum(bytes_of(loaded.slice(0, 0, std::nullopt, rows_apart).contiguous()));
    checkpoint.release(tensor.name);
  };
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) add(linear.weight(), kRowsApart);
  for (const TensorSpec& tensor : spec.other_tensors()) add(tensor, 1);
  return checksum(std::as_bytes(std::span(sums)));
}

nlohmann::json fingerprint_of(const Checkpoint& checkpoint, const ModelSpec& spec, const Recipe& recipe,
                              const Calibration& calibration, const QuantizeOptions& options,
                              const ProcessGroup& group) {
  nlohmann::json block_recipe = recipe.to_json(), block_calibration = calibration.provenance;
  block_recipe.at("training").erase("distill");
  block_calibration.erase("distill_nsamples");
  const at::Tensor ids = ids_of(std::span(calibration.windows).subspan(calibration.distill_only));
  return {{"version", STBLLM_VERSION},
          {"program", program_checksum()},
          {"config", checkpoint.config()},
          {"weights", weights_checksum(checkpoint, spec)},
          {"products", c10::toString(fast_product_dtype(calibration_device(options)))},
          {"calibration", block_calibration},
          {"tokens", checksum(bytes_of(ids))},
          {"recipe", block_recipe},
          {"plan", options.plan},
          {"blocks", options.quantized_blocks(spec)},
          {"device", options.device},
          {"processes", group.size()}};
}

void check_same_inputs(const nlohmann::json& fingerprint, const QuantizeOptions& options,
                       const ProcessGroup& group) {
  nlohmann::json own = fingerprint;
  own["report"] = options.compare_blocks;
  nlohmann::json first = own;
  group.broadcast(first, 0);
  const std::string difference = first_difference(first, own);
  if (!difference.empty())
    fail(ErrorCode::kMismatch,
         "process {} was started with other inputs than process 0 ({}); start all with the same command",
         group.rank(), difference);
}

std::string first_difference(const nlohmann::json& there, const nlohmann::json& here) {
  const nlohmann::json was = there.flatten(), is = here.flatten();
  for (const auto& [key, value] : is.items())
    if (!was.contains(key) || was[key] != value)
      return fmt::format("{}: {} there, {} here", key.substr(1),
                         was.contains(key) ? was[key].dump() : "nothing", value.dump());
  for (const auto& [key, value] : was.items())
    if (!is.contains(key)) return fmt::format("{}: {} there, nothing here", key.substr(1), value.dump());
  return "";
}

}  // namespace stbllm
