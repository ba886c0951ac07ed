#pragma once
// The two kinds of weight files, which are mapped and validated when they are opened, and the dtypes of
// safetensors as libtorch's, which reading a packed file needs too.

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "stbllm/checkpoint/checkpoint.h"

namespace stbllm {

/// The element type that safetensors calls `dtype`: "F32", "F16" or "BF16". Throws Error(kUnsupported), which
/// names the file and the tensor, for any other.
at::ScalarType scalar_type_of(const std::string& dtype, const std::filesystem::path& file,
                              const std::string& tensor);

/// The other way round: "F32", "F16" or "BF16", and "I16", which the state of a training has.
std::string_view dtype_name(const at::Tensor& tensor);

/// Throws Error(kNotFound | kCorrupt).
std::shared_ptr<const TensorSource> open_safetensors(const std::filesystem::path& path);

/// A pytorch_model.bin as torch.save has written it since PyTorch 1.6: a zip archive of a pickle and
/// storages. Storages that are not compressed are views of the mapping; torch.save never compresses them.
/// Throws Error(kNotFound | kCorrupt | kUnsupported), the last one also for the format before PyTorch 1.6.
std::shared_ptr<const TensorSource> open_torch_pickle(const std::filesystem::path& path);

}  // namespace stbllm
