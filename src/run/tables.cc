#include "stbllm/run/tables.h"

#include <ATen/ATen.h>

#include "stbllm/quantize/round_rows.h"

namespace stbllm {
namespace {

RowCoding head_coding(const ModelSpec& spec, const ModelPolicy& policy) {
  return spec.tied_head ? policy.embedding : policy.head;
}

/// The integers of a table (rows, cols), each row by itself unless the H of what it multiplies is known.
QuantizedRows encode_rows(const at::Tensor& table, int bits, const at::Tensor& hessian,
                          const std::string& name) {
  const QuantizedRows::Layout layout{table.size(0), table.size(1), bits};
  if (!hessian.defined()) {
    const auto load = [&](int64_t row, float* out) {
      at::from_blob(out, {layout.cols}, at::kFloat).copy_(table[row]);
    };
    return QuantizedRows::encode(layout, load, name);
  }
  const auto [integers, scales] = round_rows(table, bits, QuantizedRows::kColumnBlock, hessian, name);
  const auto values = [](const auto* data, const at::Tensor& of) {
    return std::span(data, static_cast<size_t>(of.numel()));
  };
  return QuantizedRows::pack(
      layout, values(integers.const_data_ptr<int8_t>(), integers),
      values(reinterpret_cast<const uint16_t*>(scales.const_data_ptr<at::Half>()), scales), name);
}

}  // namespace

RowCoding row_coding(const ModelSpec& spec, const ModelPolicy& policy, const TensorSpec& tensor) {
  if (tensor.name == spec.embedding().name) return policy.embedding;
  return tensor.name == spec.head().name ? policy.head : RowCoding::kKeep;
}

int integer_bits(RowCoding coding) {
  return coding == RowCoding::kInt8 ? 8 : coding == RowCoding::kInt4 ? 4 : 0;
}

at::Tensor stored_floats(const at::Tensor& tensor, RowCoding coding) {
  return coding == RowCoding::kFloat16 ? tensor.to(at::kHalf).to(at::kFloat) : tensor;
}

bool needs_head_hessian(const ModelSpec& spec, const ModelPolicy& policy) {
  return head_coding(spec, policy) == RowCoding::kInt4;
}

StoredTables::StoredTables(const Decoder& dense, const ModelPolicy& policy, const at::Tensor& head_hessian)
    : spec_(dense.spec()), policy_(policy) {
  const auto encode = [&](const at::Tensor& table, const TensorSpec& tensor, const at::Tensor& hessian) {
    if (const int bits = integer_bits(coding(tensor)); bits > 0)
      integers_.emplace(tensor.name, encode_rows(table.cpu(), bits, hessian, tensor.name));
  };
  encode(dense.embedding(), spec_.embedding(), spec_.tied_head ? head_hessian : at::Tensor());
  if (!spec_.tied_head) encode(dense.head(), spec_.head(), head_hessian);
}

const QuantizedRows* StoredTables::integers(const std::string& tensor) const {
  const auto found = integers_.find(tensor);
  return found == integers_.end() ? nullptr : &found->second;
}

at::Tensor StoredTables::stored(const at::Tensor& table, const TensorSpec& tensor) const {
  if (const QuantizedRows* rows = integers(tensor.name)) return dense_rows(*rows).to(table.device());
  return stored_floats(table, coding(tensor));
}

void StoredTables::install(Decoder& dense) const {
  const at::Tensor embedding = stored(dense.embedding(), spec_.embedding());
  dense.set_tables(embedding, spec_.tied_head ? embedding : stored(dense.head(), spec_.head()));
}

}  // namespace stbllm
