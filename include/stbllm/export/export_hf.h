#pragma once
// A packed file as a HuggingFace checkpoint.

#include <filesystem>
#include <string_view>

#include "stbllm/pack/packed_file.h"

namespace stbllm {

/// Writes configuration, tokenizer and weights to a directory (see CheckpointWriter). Linears and tables of
/// integers become dense in `dtype` ("float32", which holds them exactly, "bfloat16" or "float16"); what the
/// file holds dense stays as it is. Throws Error(kUsage) for another dtype, Error(kCorrupt | kWriteFailed).
void export_hf(const PackedReader& packed, const std::filesystem::path& directory, std::string_view dtype);

}  // namespace stbllm
