#pragma once
// SHA-256 (FIPS 180-4). It names the text that a result belongs to, so that anybody can compare it with
// sha256sum.

#include <span>
#include <string>
#include <string_view>

namespace stbllm {

/// The digest as 64 hex digits.
std::string sha256(std::span<const std::byte> bytes);
std::string sha256(std::string_view text);

}  // namespace stbllm
