#pragma once
// Whether a model is judged on text that it was calibrated on, be that a part of another text.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "stbllm/text/windows.h"

namespace stbllm {

/// A mark of each window, the checksum of 32 tokens in its middle. Shorter windows have none.
std::vector<std::string> marks_of(const Windows& windows);

/// How many of `marks` are those of 32 neighbouring tokens somewhere in `ids`.
int64_t count_marks(std::span<const int32_t> ids, const std::vector<std::string>& marks);

}  // namespace stbllm
