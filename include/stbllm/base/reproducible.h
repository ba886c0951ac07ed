#pragma once
// Makes results independent of the number of threads.

namespace stbllm {

/// Tells MKL, which multiplies for libtorch, not to split sums by the number of threads. It must be called
/// before the first product. A setting that the environment holds already stays.
void make_products_reproducible();

}  // namespace stbllm
