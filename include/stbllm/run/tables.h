#pragma once
// The tables at both ends of a model, embedding and head, as a recipe stores them.

#include <string>

#include "stbllm/model/decoder.h"
#include "stbllm/pack/quantized_rows.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {

/// How a tensor beside the linears' weights is stored: kKeep unless it is one of the tables.
RowCoding row_coding(const ModelSpec& spec, const ModelPolicy& policy, const TensorSpec& tensor);

/// Bits of an integer of kInt8 or kInt4; 0 where rows stay floating-point numbers.
int integer_bits(RowCoding coding);

/// The packed form of a table (rows, cols) of integers.
QuantizedRows encode_rows(const at::Tensor& table, RowCoding coding, const std::string& name);

/// What a tensor becomes by being stored; float32 unless it is kept.
at::Tensor stored_table(const at::Tensor& table, RowCoding coding, const std::string& name);

/// Replaces the tables at both ends of a dense decoder by what the packed file will hold.
void store_tables(Decoder& decoder, const ModelPolicy& policy);

}  // namespace stbllm
