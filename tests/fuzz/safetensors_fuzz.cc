// The weights of a checkpoint in safetensors: the header, and every tensor.

#include <ATen/ATen.h>

#include "fuzz/fuzz_target.h"
#include "stbllm/checkpoint/sources.h"

namespace {

void read(stbllm::fuzz::Bytes bytes) {
  stbllm::fuzz::allow_error([&] {
    const auto source = stbllm::open_safetensors(stbllm::fuzz::file_of(bytes, "model.safetensors"));
    for (const std::string& name : source->names())
      stbllm::fuzz::allow_error([&] { at::Tensor(source->load(name)).sum(); });
  });
}

}  // namespace

STBLLM_FUZZ_TARGET(safetensors) {
  read(bytes);
  const std::string repaired = stbllm::fuzz::repaired_safetensors(bytes);
  read(std::as_bytes(std::span(repaired)));
}
