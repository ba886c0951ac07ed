#pragma once
// A quantized block as a file of the work directory: its planes as in a packed file, with the results beside.

#include <filesystem>
#include <optional>

#include "stbllm/calibrate/quantized_block.h"

namespace stbllm {

/// The file appears by rename: it is complete or not there. Throws Error(kWriteFailed).
void save_block(const std::filesystem::path& path, const QuantizedBlock& quantized);
/// Nothing when there is no such file. Throws Error(kCorrupt) for a damaged one.
std::optional<QuantizedBlock> load_block(const std::filesystem::path& path);

/// As above for all `blocks`, in a directory that is made where it is missing.
void save_blocks(const std::filesystem::path& directory, const std::vector<QuantizedBlock>& blocks);
/// Nothing unless all `count` blocks are there.
std::optional<std::vector<QuantizedBlock>> load_blocks(const std::filesystem::path& directory, size_t count);

/// "block_007.safetensors"
std::string block_file_name(int64_t block);

}  // namespace stbllm
