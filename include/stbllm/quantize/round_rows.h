#pragma once
// Small integers for the rows of a head, which is a linear: they are rounded under the output error that its
// inputs make of them.

#include <ATen/core/Tensor.h>

#include <string>

namespace stbllm {

struct RoundedRows {
  at::Tensor integers;  ///< (rows, cols) int8
  at::Tensor scales;    ///< (rows, ceil(cols / column_block)) float16, of either sign
};

/// table: (rows, cols), a floating-point dtype, in host memory; hessian: H (cols, cols) of its inputs;
/// integers of `bits` bits, a scale for `column_block` columns of a row. Columns go from the one with the
/// most energy to the one with the least, and each passes its error on to those that follow (GPTQ with its
/// order by activations); scales are searched before, in the metric of single columns. Throws
/// Error(kUnsupported) naming `what` where a weight is not finite or too large for fp16 scales.
RoundedRows round_rows(const at::Tensor& table, int bits, int64_t column_block, const at::Tensor& hessian,
                       const std::string& what);

}  // namespace stbllm
