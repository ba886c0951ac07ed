#pragma once
// The two kinds of weight files, which are mapped and validated when they are opened, and the dtypes of
// safetensors as libtorch's, which reading a packed file needs too.

#include <filesystem>
#include <memory>
#include <string>

#include "stbllm/checkpoint/checkpoint.h"

namespace stbllm {

/// The element type that safetensors calls `dtype`: "F32", "F16" or "BF16". Throws Error(kUnsupported), which
/// names the file and the tensor, for any other.
at::ScalarType scalar_type_of(const std::string& dtype, const std::filesystem::path& file,
                              const std::string& tensor);

/// Throws Error(kNotFound | kCorrupt).
std::shared_ptr<const TensorSource> open_safetensors(const std::filesystem::path& path);

/// A pytorch_model.bin as torch.save has written it since PyTorch 1.6: a zip archive of a pickle and
/// storages. Storages that are stored uncompressed (torch.save does nothing else) are views of the mapping.
/// Throws Error(kNotFound | kCorrupt | kUnsupported); the format before 1.6 is kUnsupported.
std::shared_ptr<const TensorSource> open_torch_pickle(const std::filesystem::path& path);

}  // namespace stbllm
