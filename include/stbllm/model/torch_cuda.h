#pragma once
// libtorch's CUDA half. The program is not linked with it, so that it also runs where that library is
// missing.

#include <string>

namespace stbllm {

/// Loads libtorch's CUDA half at the first call. Returns nothing when tensors can live on a CUDA device, and
/// else one clause that says why they cannot. It must come before anything else asks libtorch about CUDA,
/// since libtorch remembers the answer.
std::string torch_cuda_fault();

}  // namespace stbllm
