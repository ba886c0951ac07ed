#include "stbllm/model/load_model.h"

#include <filesystem>

#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/model/torch_cuda.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {
namespace {

/// As find_backend; one on CUDA needs libtorch's half too, for all that is not a packed product.
const Backend& choose_backend(const std::string& name) {
  if (name == "auto") log::debug("{}", describe_auto_backend());
  const Backend& chosen = find_backend(name);
  if (chosen.device() != "cuda" || torch_cuda_fault().empty()) return chosen;
  if (name != "auto" || !backend_of_environment().empty())
    fail(ErrorCode::kUnsupported, "backend 'cuda' cannot run a model here: {}; or use 'cpu'",
         torch_cuda_fault());
  log::warn("a CUDA device is present, but {}; the model runs on the CPU", torch_cuda_fault());
  return find_backend("cpu");
}

/// The checksums of the texts that a file was calibrated on, one or several.
std::vector<std::string> calibration_checksums(const nlohmann::json& calibration) {
  std::vector<std::string> checksums;
  const auto add = [&](const nlohmann::json& text) {
    const auto found = text.is_object() ? text.find("sha256") : text.end();
    if (found != text.end() && found->is_string()) checksums.push_back(*found);
  };
  add(calibration);
  const auto texts = calibration.is_object() ? calibration.find("texts") : calibration.end();
  if (texts != calibration.end() && texts->is_array())
    for (const nlohmann::json& text : *texts) add(text);
  return checksums;
}

std::vector<std::string> calibration_marks(const nlohmann::json& calibration) {
  std::vector<std::string> marks;
  const auto found = calibration.is_object() ? calibration.find("marks") : calibration.end();
  if (found != calibration.end() && found->is_array())
    for (const nlohmann::json& mark : *found)
      if (mark.is_string()) marks.push_back(mark);
  return marks;
}

}  // namespace

std::vector<int32_t> LoadedModel::stop_ids() const {
  std::vector<int32_t> ids = decoder.spec().stop_ids;
  if (tokenizer->eos_id() >= 0) ids.push_back(tokenizer->eos_id());
  return ids;
}

LoadedModel load_model(const std::string& path, const std::string& backend, const std::string& dtype,
                       bool keep_blocks) {
  if (dtype != "float32" && dtype != "bfloat16")
    fail(ErrorCode::kUsage, "dtype '{}' of activations is not known; expected float32 or bfloat16", dtype);
  const at::ScalarType type = dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  if (!std::filesystem::exists(path))
    fail(ErrorCode::kNotFound,
         "{}: no such file or directory; expected a packed .safetensors file or a checkpoint directory",
         path);
  const Backend& chosen = choose_backend(backend);
  const at::Device device = device_of(chosen);
  if (std::filesystem::is_directory(path)) {
    const Checkpoint checkpoint = Checkpoint::open(path);
    DecoderOptions options;
    options.dtype = type;
    options.device = device;
    options.keep_blocks = keep_blocks;
    return {path,
            Decoder::from_checkpoint(checkpoint, options),
            Tokenizer::load(path),
            device.is_cpu() ? "dense" : fmt::format("dense on {}", chosen.device()),
            {},
            {}};
  }
  const PackedReader reader = PackedReader::open(path);
  reader.verify_checksums();
  const nlohmann::json calibration = reader.remark("calibration");
  return {path,
          Decoder::from_packed(reader, chosen, type),
          Tokenizer::from_serialized(reader.metadata("tokenizer")),
          std::string(chosen.name()),
          calibration_checksums(calibration),
          calibration_marks(calibration)};
}

}  // namespace stbllm
