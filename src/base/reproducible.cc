#include "stbllm/base/reproducible.h"

#include <cstdlib>

/// By this function MKL asks whether the processor is Intel's, and where it is not, it does not keep to the
/// setting below: on a Zen 3 machine products of 10 x 10 and 10 x 30 matrices differed between two and three
/// threads, and so did packed files. The program's own answer takes the place of MKL's. Which instructions
/// MKL uses depends on the features of the processor all the same. Where a libtorch has no such function,
/// this one is never called.
extern "C" int mkl_serv_intel_cpu_true();
extern "C" int mkl_serv_intel_cpu_true() { return 1; }

namespace stbllm {

void make_products_reproducible() { ::setenv("MKL_CBWR", "AUTO,STRICT", /*overwrite=*/0); }

}  // namespace stbllm
