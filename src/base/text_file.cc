#include "stbllm/base/text_file.h"

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"

namespace stbllm {

std::string read_text(const std::filesystem::path& path) {
  const std::unique_ptr<std::FILE, decltype(&std::fclose)> file(std::fopen(path.c_str(), "rbe"), std::fclose);
  if (file == nullptr) fail(ErrorCode::kNotFound, "{}: cannot open: {}", path.string(), std::strerror(errno));
  std::string text;
  std::array<char, 1 << 16> buffer;
  while (const size_t count = std::fread(buffer.data(), 1, buffer.size(), file.get()))
    if (text.append(buffer.data(), count).size() > kMaxTextBytes)
      fail(ErrorCode::kUnsupported, "{}: more than {} bytes; use a part of it", path.string(), kMaxTextBytes);
  if (std::ferror(file.get()))
    fail(ErrorCode::kNotFound, "{}: cannot read: {}", path.string(), std::strerror(errno));
  return text;
}

void write_text(const std::filesystem::path& path, std::string_view text) {
  TemporaryFile file(path);
  file.write(std::as_bytes(std::span(text)));
  file.rename(path);
}

}  // namespace stbllm
