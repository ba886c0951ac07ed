#pragma once
// Files that are read or written in one go.

#include <filesystem>
#include <string>
#include <string_view>

namespace stbllm {

/// The longest text that is read at once: positions in it are 32-bit numbers, and SentencePiece's mark makes
/// three bytes of each space.
inline constexpr size_t kMaxTextBytes = size_t{1} << 30;

/// All bytes of a file, which may be a pipe. Throws Error(kNotFound) when it cannot be opened or read,
/// Error(kUnsupported) when it is longer than kMaxTextBytes.
std::string read_text(const std::filesystem::path& path);

/// Writes a whole file. It appears under its name complete or not at all, also when the power fails (see
/// durable_file.h). Throws Error(kWriteFailed).
void write_text(const std::filesystem::path& path, std::string_view text);

}  // namespace stbllm
