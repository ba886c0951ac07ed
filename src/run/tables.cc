#include "stbllm/run/tables.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace stbllm {

RowCoding row_coding(const ModelSpec& spec, const ModelPolicy& policy, const TensorSpec& tensor) {
  if (tensor.name == spec.embedding().name) return policy.embedding;
  return tensor.name == spec.head().name ? policy.head : RowCoding::kKeep;
}

int integer_bits(RowCoding coding) {
  return coding == RowCoding::kInt8 ? 8 : coding == RowCoding::kInt4 ? 4 : 0;
}

QuantizedRows encode_rows(const at::Tensor& table, RowCoding coding, const std::string& name) {
  const QuantizedRows::Layout layout{table.size(0), table.size(1), integer_bits(coding)};
  const auto load = [&](int64_t row, float* out) {
    at::from_blob(out, {layout.cols}, at::kFloat).copy_(table[row]);
  };
  return QuantizedRows::encode(layout, load, name);
}

at::Tensor stored_table(const at::Tensor& table, RowCoding coding, const std::string& name) {
  if (coding == RowCoding::kKeep) return table;
  if (coding == RowCoding::kFloat16) return table.to(at::kHalf).to(at::kFloat);
  const QuantizedRows rows = encode_rows(table, coding, name);
  at::Tensor result = at::empty(table.sizes(), at::kFloat);
  constexpr int64_t kRowsPerTask = 64;
  at::parallel_for(0, table.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      rows.decode_row(row, result.data_ptr<float>() + row * table.size(1));
  });
  return result;
}

void store_tables(Decoder& decoder, const ModelPolicy& policy) {
  const ModelSpec& spec = decoder.spec();
  const auto stored = [&](const at::Tensor& table, RowCoding coding, const TensorSpec& tensor) {
    return stored_table(table.cpu(), coding, tensor.name).to(decoder.device());
  };
  const at::Tensor embedding = stored(decoder.embedding(), policy.embedding, spec.embedding());
  decoder.set_tables(embedding,
                     spec.tied_head ? embedding : stored(decoder.head(), policy.head, spec.head()));
}

}  // namespace stbllm
