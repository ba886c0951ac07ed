#include "stbllm/export/flip_signs.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "stbllm/base/interrupt.h"
#include "stbllm/base/random.h"
#include "stbllm/calibrate/pack_weight.h"

namespace stbllm {
namespace {

/// Flips signs of kept weights in ordinary columns of `weight`.
FlippedSigns flip(BinarizedWeight& weight, double share, SplitMix64& random) {
  const int64_t rows = weight.rows(), cols = weight.cols();
  at::Tensor ordinary = at::ones({cols}, at::kBool);
  if (weight.has_salient()) ordinary.index_fill_(0, weight.salient_columns.to(at::kLong), false);
  if (weight.has_outliers()) ordinary.index_fill_(0, weight.outlier_columns.to(at::kLong), false);
  const bool* may_flip = ordinary.data_ptr<bool>();
  FlippedSigns count;
  for (int64_t row = 0; row < rows; ++row) {
    int8_t* symbols = weight.symbols.data_ptr<int8_t>() + row * cols;
    for (int64_t col = 0; col < cols; ++col) {
      if (symbols[col] == 0 || !may_flip[col]) continue;
      ++count.kept;
      if (random.uniform() >= share) continue;
      ++count.flipped;
      symbols[col] = static_cast<int8_t>(-symbols[col]);
    }
  }
  return count;
}

}  // namespace

FlippedSigns flip_signs(const PackedReader& packed, const std::filesystem::path& path, double share,
                        uint64_t seed, bool force) {
  PackedWriter writer(path, force);
  SplitMix64 random(seed);
  FlippedSigns total;
  for (const auto& [name, matrix] : packed.linears()) {
    check_interrupt();
    BinarizedWeight weight = unpack_weight(matrix);
    const FlippedSigns count = flip(weight, share, random);
    total.kept += count.kept;
    total.flipped += count.flipped;
    writer.add_linear(name, pack_weight(weight, name));
  }
  for (const auto& [name, rows] : packed.quantized_rows()) writer.add_quantized_rows(name, rows);
  for (const auto& [name, tensor] : packed.dense_tensors())
    writer.add_dense(name, tensor.dtype, tensor.shape, tensor.data);
  for (const auto& [key, value] : packed.file()->metadata())
    if (!PackedWriter::is_own_metadata(key)) writer.set_metadata(key, value);
  writer.set_metadata("flipped_signs", nlohmann::json{{"share", share}, {"seed", seed}}.dump());
  writer.finish();
  writer.commit();
  return total;
}

}  // namespace stbllm
