// A pytorch_model.bin: zip archive, pickle, and every tensor.

#include <ATen/ATen.h>

#include "fuzz/fuzz_target.h"
#include "stbllm/checkpoint/sources.h"

STBLLM_FUZZ_TARGET(torch_zip) {
  stbllm::fuzz::allow_error([&] {
    const auto source = stbllm::open_torch_pickle(stbllm::fuzz::file_of(bytes, "pytorch_model.bin"));
    for (const std::string& name : source->names())
      stbllm::fuzz::allow_error([&] { at::Tensor(source->load(name)).sum(); });
  });
}
