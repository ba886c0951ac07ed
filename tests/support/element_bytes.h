#pragma once

#include <cstdint>

#include "stbllm/backend/backend.h"

namespace stbllm::test {

constexpr int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

}  // namespace stbllm::test
