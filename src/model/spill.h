#pragma once
// Tensors that live in a file, so that they take memory only while they are in use.

#include <ATen/core/Tensor.h>

#include <filesystem>

namespace stbllm {

/// A tensor in a file of `directory` that has no name: it goes with the tensor, or with the process,
/// however that ends. Throws Error(kWriteFailed) when the disk has no room.
at::Tensor spilled_tensor(at::IntArrayRef sizes, at::ScalarType dtype,
                          const std::filesystem::path& directory);

/// Says that `part` of a spilled tensor is not needed for now: it leaves memory and keeps its values. Other
/// tensors stay as they are.
void release_spilled(const at::Tensor& part);

}  // namespace stbllm
