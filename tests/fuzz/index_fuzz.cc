// The index of a sharded checkpoint, beside which lies one shard with the tensor "a".

#include <ATen/ATen.h>

#include "fuzz/fuzz_target.h"
#include "stbllm/checkpoint/checkpoint.h"

namespace {

void write(const std::string& text, const std::string& name) {
  stbllm::fuzz::file_of(std::as_bytes(std::span(text)), name);
}

}  // namespace

STBLLM_FUZZ_TARGET(index) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  write("{}", "config.json");
  write(static_cast<char>(header.size()) + std::string(7, '\0') + header + std::string(4, '\0'),
        "s.safetensors");
  const auto index = stbllm::fuzz::file_of(bytes, "model.safetensors.index.json");
  stbllm::fuzz::allow_error([&] {
    const auto checkpoint = stbllm::Checkpoint::open(index.parent_path());
    checkpoint.load("a", {1});
  });
}
