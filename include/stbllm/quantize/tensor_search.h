#pragma once
// The steps of lean_weight.h as libtorch's operations on whole matrices. They run where the matrices are: a
// GPU has nothing else, and on the CPU they are the twins of the loops over lanes. Small things (scales,
// levels, the metric of a group) stay in host memory.

#include "stbllm/quantize/lean_weight.h"

namespace stbllm {

/// As their namesakes do, but for the order of sums: a code may differ where two are equally good to
/// rounding. Codes must be enumerable; `target`, `hessian`, `symbols` and `upper` are on one device.
namespace by_tensors {
void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate);
void refit(LeanWeight& lean, bool with_levels = true);
double descend(LeanWeight& lean);
}  // namespace by_tensors

}  // namespace stbllm
