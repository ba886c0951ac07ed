#include "stbllm/pipeline/load_model.h"

#include <filesystem>

#include "stbllm/backend/backend.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {

LoadedModel load_model(const std::string& path, const std::string& backend, const std::string& dtype, bool keep_blocks) {
  const at::ScalarType type = dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  if (!std::filesystem::exists(path))
    fail(ErrorCode::kNotFound, "{}: no such file or directory; expected a packed .safetensors file or a checkpoint directory", path);
  if (std::filesystem::is_directory(path)) {
    const Checkpoint checkpoint = Checkpoint::open(path);
    DecoderOptions options;
    options.dtype = type;
    options.keep_blocks = keep_blocks;
    return {Decoder::from_checkpoint(checkpoint, options), Tokenizer::load(path), "dense", ""};
  }
  const PackedReader reader = PackedReader::open(path);
  if (backend == "auto") log::debug("{}", describe_auto_backend());
  const Backend& chosen = find_backend(backend);
  const auto calibration = nlohmann::json::parse(reader.metadata("calibration"), nullptr, /*allow_exceptions=*/false);
  return {Decoder::from_packed(reader, chosen, type), Tokenizer::from_serialized(reader.metadata("tokenizer")), std::string(chosen.name()),
          calibration.is_object() ? calibration.value("sha256", "") : ""};
}

}  // namespace stbllm
