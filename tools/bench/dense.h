#pragma once
// The yardstick: the same product with dense weights by libtorch (oneDNN for bfloat16).

#include <cstdint>

#include "stbllm/backend/backend.h"

namespace stbllm::bench {

/// Best seconds of y = x W^T with `copies` weight matrices in turn, so that they come from memory.
double dense_seconds(ElementType type, int64_t rows, int64_t cols, int64_t tokens, int copies,
                     double min_seconds, int threads);

}  // namespace stbllm::bench
