#define XXH_INLINE_ALL
#include "stbllm/base/checksum.h"

#include <fmt/format.h>
#include <xxhash.h>

namespace stbllm {

std::string checksum(std::span<const std::byte> bytes) {
  return fmt::format("{:016x}", XXH3_64bits(bytes.data(), bytes.size()));
}

}  // namespace stbllm
