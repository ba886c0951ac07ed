#pragma once
// The two kinds of weight files. Both are mapped and validated when they are opened.

#include <filesystem>
#include <memory>

#include "stbllm/checkpoint/checkpoint.h"

namespace stbllm {

/// Throws Error(kNotFound | kCorrupt).
std::shared_ptr<const TensorSource> open_safetensors(const std::filesystem::path& path);

/// A pytorch_model.bin as torch.save has written it since PyTorch 1.6: a zip archive of a pickle and
/// storages. Storages that are stored uncompressed (torch.save does nothing else) are views of the mapping.
/// Throws Error(kNotFound | kCorrupt | kUnsupported); the format before 1.6 is kUnsupported.
std::shared_ptr<const TensorSource> open_torch_pickle(const std::filesystem::path& path);

}  // namespace stbllm
