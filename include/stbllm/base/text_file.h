#pragma once
// Files that are read or written in one go.

#include <filesystem>
#include <string>
#include <string_view>

namespace stbllm {

/// All bytes of a file, which may be a pipe. Throws Error(kNotFound) when it cannot be opened or read.
std::string read_text(const std::filesystem::path& path);

/// Writes a whole file. It appears under its name complete or not at all, also when the power fails (see
/// durable_file.h). Throws Error(kWriteFailed).
void write_text(const std::filesystem::path& path, std::string_view text);

}  // namespace stbllm
