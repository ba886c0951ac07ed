#pragma once
// libtorch's CUDA half. The program is not linked with it, so that it runs where it is missing.

#include <string>

namespace stbllm {

/// Loads it, once. Empty when tensors can live on a CUDA device; else one clause that says why not. Call it
/// before anything else asks libtorch about CUDA: it remembers the answer.
std::string torch_cuda_fault();

}  // namespace stbllm
