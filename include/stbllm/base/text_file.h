#pragma once
// Small files that are written in one go.

#include <filesystem>
#include <string>

namespace stbllm {

/// Writes a whole file: it appears by rename, complete or not at all. Throws Error(kWriteFailed).
void write_text(const std::filesystem::path& path, const std::string& text);

}  // namespace stbllm
