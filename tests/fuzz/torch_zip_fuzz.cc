// A pytorch_model.bin: zip archive, pickle, and every tensor.

#include <ATen/ATen.h>

#include "fuzz/fuzz_target.h"
#include "stbllm/checkpoint/sources.h"

// libtorch's zip reader leaks its directory when it finds a damaged archive.
extern "C" const char* __lsan_default_suppressions() { return "leak:mz_zip_reader_"; }

STBLLM_FUZZ_TARGET(torch_zip) {
  stbllm::fuzz::allow_error([&] {
    const auto source = stbllm::open_torch_pickle(stbllm::fuzz::file_of(bytes, "pytorch_model.bin"));
    for (const std::string& name : source->names())
      stbllm::fuzz::allow_error([&] { at::Tensor(source->load(name)).sum(); });
  });
}
