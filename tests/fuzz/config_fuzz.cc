// config.json of a checkpoint.

#include "fuzz/fuzz_target.h"
#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/model/model_spec.h"

STBLLM_FUZZ_TARGET(config) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  const std::string weights =
      static_cast<char>(header.size()) + std::string(7, '\0') + header + std::string(4, '\0');
  stbllm::fuzz::file_of(std::as_bytes(std::span(weights)), "model.safetensors");
  const auto config = stbllm::fuzz::file_of(bytes, "config.json");
  stbllm::fuzz::allow_error([&] {
    const auto checkpoint = stbllm::Checkpoint::open(config.parent_path());
    const auto spec = stbllm::ModelSpec::from_config(checkpoint.config());
    spec.linear_weights();
    if (spec.layers < 100) stbllm::ModelSpec::from_checkpoint(checkpoint);
  });
}
