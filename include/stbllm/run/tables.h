#pragma once
// The tables at both ends of a model, embedding and head, as a recipe stores them.

#include <map>
#include <string>

#include "stbllm/model/decoder.h"
#include "stbllm/pack/quantized_rows.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {

/// How a tensor beside the linears' weights is stored: kKeep unless it is one of the tables.
RowCoding row_coding(const ModelSpec& spec, const ModelPolicy& policy, const TensorSpec& tensor);

/// Bits of an integer of kInt8 or kInt4; 0 where rows stay floating-point numbers.
int integer_bits(RowCoding coding);

/// What floating-point numbers become by being stored: with kFloat16 they are rounded to fp16.
at::Tensor stored_floats(const at::Tensor& tensor, RowCoding coding);

/// Whether the integers of the head depend on what it reads: 8 bits are enough for any rounding, 4 are not. A
/// tied head is coded as the embedding is.
bool needs_head_hessian(const ModelSpec& spec, const ModelPolicy& policy);

/// What the tables of a model become by being stored. Integers are made once, since everything behind the
/// embedding depends on them.
class StoredTables {
 public:
  /// Of a dense decoder; `head_hessian` where needs_head_hessian().
  StoredTables(const Decoder& dense, const ModelPolicy& policy, const at::Tensor& head_hessian = {});

  RowCoding coding(const TensorSpec& tensor) const { return row_coding(spec_, policy_, tensor); }
  /// The integers of a table, or null where it stays floating-point numbers or is none.
  const QuantizedRows* integers(const std::string& tensor) const;
  /// Replaces the tables of a dense decoder by what the packed file will hold.
  void install(Decoder& dense) const;

 private:
  at::Tensor stored(const at::Tensor& table, const TensorSpec& tensor) const;

  ModelSpec spec_;
  ModelPolicy policy_;
  std::map<std::string, QuantizedRows> integers_;  // by the full name of the tensor
};

}  // namespace stbllm
