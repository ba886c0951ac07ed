#pragma once
// SHA-256 (FIPS 180-4), to name the text or the ids that a result belongs to.

#include <span>
#include <string>
#include <string_view>

namespace stbllm {

/// 64 hex digits.
std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);

}  // namespace stbllm
