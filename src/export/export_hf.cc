#include "stbllm/export/export_hf.h"

#include <ATen/ATen.h>

#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/checkpoint/checkpoint_writer.h"
#include "stbllm/checkpoint/sources.h"
#include "stbllm/model/table.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

struct Dtype {
  std::string_view name;
  at::ScalarType type;
};
constexpr Dtype kDtypes[] = {{"float32", at::kFloat}, {"bfloat16", at::kBFloat16}, {"float16", at::kHalf}};

const Dtype& find_dtype(std::string_view name) {
  for (const Dtype& dtype : kDtypes)
    if (dtype.name == name) return dtype;
  fail(ErrorCode::kUsage, "dtype '{}' of weights is not known; expected float32, bfloat16 or float16", name);
}

}  // namespace

void export_hf(const PackedReader& packed, const std::filesystem::path& directory, std::string_view dtype) {
  const Dtype& to = find_dtype(dtype);
  const nlohmann::json config = packed.config();
  CheckpointWriter checkpoint(directory);
  const auto add = [&](const std::string& name, const at::Tensor& weight) {
    check_interrupt();
    const at::Tensor stored = weight.to(to.type);
    if (to.type == at::kHalf && !at::isfinite(stored).all().item<bool>())
      fail(ErrorCode::kUnsupported, "{}: a weight is too large for float16; choose another dtype", name);
    checkpoint.add(name + ".weight", dtype_name(stored), stored.sizes().vec(), bytes_of(stored));
  };
  for (const auto& [name, matrix] : packed.linears()) add(name, unpack_dense(matrix));
  for (const auto& [name, rows] : packed.quantized_rows()) add(name, dense_rows(rows));
  for (const auto& [name, tensor] : packed.dense_tensors())
    checkpoint.add(name, tensor.dtype, tensor.shape, tensor.data);
  const auto tokenizer = Tokenizer::from_serialized(packed.metadata("tokenizer"));
  for (const auto& [name, text] : tokenizer->files()) checkpoint.add_file(name, text);
  checkpoint.add_config(config, to.name);
  checkpoint.commit();
}

}  // namespace stbllm
