#pragma once
// The one place that sees both a tensor and a packed matrix.

#include <span>
#include <string_view>

#include "stbllm/model/model_spec.h"
#include "stbllm/pack/structured_binary_matrix.h"
#include "stbllm/quantize/binarized_weight.h"
#include "stbllm/quantize/method.h"
#include "stbllm/quantize/scheme.h"

namespace stbllm {

/// The elements of a contiguous tensor as they lie in memory.
inline std::span<const std::byte> bytes_of(const at::Tensor& tensor) {
  return {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()};
}

/// How a quantized linear lies in planes.
Layout layout_of(const BinarizedWeight& weight);
/// What `method` is going to make of a linear under a scheme, without salient and outlier columns.
Layout layout_of(const LinearSpec& linear, const Scheme& scheme, const Method& method);

/// The planes of a quantized linear, in memory of their own. matrix.at(r, c) == weight.to_dense()[r][c],
/// exactly.
StructuredBinaryMatrix pack_weight(const BinarizedWeight& weight, std::string_view name);

/// All weights of a packed matrix, float32 (rows, cols).
at::Tensor unpack_dense(const StructuredBinaryMatrix& matrix);

/// The inverse of pack_weight: packing the result again gives the same bytes.
BinarizedWeight unpack_weight(const StructuredBinaryMatrix& matrix);

}  // namespace stbllm
