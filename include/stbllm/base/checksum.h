#pragma once
// A name for bytes: it tells equal from different, and guards against damage, not against an attacker.

#include <cstddef>
#include <span>
#include <string>

namespace stbllm {

/// XXH3-64 of the bytes as 16 hex digits.
std::string checksum(std::span<const std::byte> bytes);

}  // namespace stbllm
