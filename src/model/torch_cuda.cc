#include "stbllm/model/torch_cuda.h"

#include <ATen/Context.h>
#include <dlfcn.h>
#include <fmt/format.h>

namespace stbllm {
namespace {

std::string load() {
  // Static initialisers of this library register the CUDA kernels of libtorch. Its symbols are made global
  // for the libraries that are loaded after it.
  if (::dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr)
    return fmt::format(
        "libtorch's CUDA library cannot be loaded ({}); set TORCH_ROOT to a PyTorch with CUDA and build "
        "again",
        ::dlerror());
  return at::hasCUDA() ? "" : "libtorch finds no CUDA device";
}

}  // namespace

std::string torch_cuda_fault() {
  static const std::string fault = load();
  return fault;
}

}  // namespace stbllm
