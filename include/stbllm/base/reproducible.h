#pragma once
// What makes results independent of the machine's number of threads.

#include <cstdlib>

namespace stbllm {

/// MKL, which multiplies for libtorch, splits some sums by the number of threads unless it is told not to
/// before its first product. What the environment says already stays.
inline void make_products_reproducible() { ::setenv("MKL_CBWR", "AUTO,STRICT", /*overwrite=*/0); }

}  // namespace stbllm
