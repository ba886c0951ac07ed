#pragma once

#include <cstdint>
#include <vector>

namespace stbllm {

/// Token ids of equally long pieces of a text.
using Windows = std::vector<std::vector<int32_t>>;

}  // namespace stbllm
