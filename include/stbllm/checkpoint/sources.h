#pragma once
// The two kinds of weight files. Both are mapped and validated when they are opened.

#include <filesystem>
#include <memory>

#include "stbllm/checkpoint/checkpoint.h"

namespace stbllm {

/// Throws Error(kNotFound | kCorrupt).
std::shared_ptr<const TensorSource> open_safetensors(const std::filesystem::path& path);

/// A pytorch_model.bin as torch.save has written it since PyTorch 1.6: a zip archive of a pickle and
/// storages. Storages that are not compressed are views of the mapping; torch.save never compresses them.
/// Throws Error(kNotFound | kCorrupt | kUnsupported), the last one also for the format before PyTorch 1.6.
std::shared_ptr<const TensorSource> open_torch_pickle(const std::filesystem::path& path);

}  // namespace stbllm
