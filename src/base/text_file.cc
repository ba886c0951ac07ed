#include "stbllm/base/text_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <fstream>

#include "stbllm/base/error.h"

namespace stbllm {

void write_text(const std::filesystem::path& path, const std::string& text) {
  const std::filesystem::path unfinished = fmt::format("{}.part-{}", path.string(), ::getpid());
  std::ofstream file(unfinished, std::ios::binary);
  file << text;
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(unfinished, path, error);
  if (!file || error)
    fail(ErrorCode::kWriteFailed, "{}: cannot be written; check the path and the disk", path.string());
}

}  // namespace stbllm
