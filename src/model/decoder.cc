#include "stbllm/model/decoder.h"

#include <ATen/ATen.h>
#include <fmt/ranges.h>

#include <cmath>
#include <span>

#include "decode_step.h"
#include "stbllm/base/error.h"
#include "stbllm/model/packed_tensors.h"

namespace stbllm {
namespace {

/// Yields a tensor of the model, owned, in the decoder's dtype and on its device.
using TensorLoader = std::function<at::Tensor(const TensorSpec&)>;

void check_dtype(at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16)
    fail(ErrorCode::kUnsupported, "activations in {} are not supported; use float32 or bfloat16",
         at::toString(dtype));
}

NormWeights load_norm(const std::vector<TensorSpec>& tensors, const TensorLoader& load) {
  NormWeights norm;
  if (!tensors.empty()) norm.weight = load(tensors[0]);
  if (tensors.size() > 1) norm.bias = load(tensors[1]);
  return norm;
}

/// `make_linear` turns a linear and its bias (perhaps undefined) into what multiplies.
template <typename MakeLinear>
std::shared_ptr<DecoderBlock> load_block(const ModelSpec& spec, int64_t index, const TensorLoader& load,
                                         const MakeLinear& make_linear) {
  auto block = std::make_shared<DecoderBlock>(spec, index);
  for (const NormSpec& norm : block->norms()) block->norm(norm.role) = load_norm(norm.tensors, load);
  for (const LinearSpec& linear : block->linears())
    block->set_linear(linear.role, make_linear(linear, linear.has_bias ? load(linear.bias()) : at::Tensor()));
  return block;
}

}  // namespace

void Decoder::load_outer(const TensorLoader& load, const TableLoader& load_table) {
  outer_.embedding = load_table(spec_.embedding());
  outer_.head = spec_.tied_head ? outer_.embedding : load_table(spec_.head());
  if (spec_.architecture->position == Position::kLearned)
    outer_.position_table = load(spec_.position_table());
  if (spec_.has_projections()) {
    outer_.project_in = load(spec_.project_in());
    outer_.project_out = load(spec_.project_out());
  }
  if (spec_.has_final_norm)
    outer_.final_norm = load_norm(spec_.norm_tensors(spec_.final_norm(), spec_.hidden), load);
}

Decoder Decoder::from_checkpoint(const Checkpoint& checkpoint, const DecoderOptions& options) {
  check_dtype(options.dtype);
  Decoder decoder(ModelSpec::from_checkpoint(checkpoint), options.dtype, options.device);
  const TensorLoader load = [checkpoint, options](const TensorSpec& spec) {
    const at::Tensor mapped = checkpoint.load(spec.name, spec.shape);
    at::Tensor owned = mapped.to(options.device, options.dtype, /*non_blocking=*/false, /*copy=*/true);
    checkpoint.release(spec.name);
    if (!std::isfinite(owned.sum().item<float>()))
      if (const at::Tensor places = owned.isfinite().logical_not().nonzero(); places.size(0) > 0) {
        const at::Tensor first = places[0].cpu();
        fail(ErrorCode::kCorrupt,
             "{}: tensor {} holds values that are not finite, {} of them, the first at [{}]; check the "
             "checkpoint",
             checkpoint.directory().string(), spec.name, places.size(0),
             fmt::join(std::span(first.const_data_ptr<int64_t>(), static_cast<size_t>(first.numel())), ", "));
      }
    return owned;
  };
  decoder.load_outer(load, [&](const TensorSpec& table) { return Table(load(table)); });
  decoder.keep_blocks_ = options.keep_blocks;
  decoder.load_block_ = [spec = decoder.spec_, load,
                         product = options.product_dtype.value_or(options.dtype)](int64_t index) {
    return load_block(spec, index, load, [&](const LinearSpec& linear, at::Tensor bias) {
      return std::make_unique<DenseLinear>(load(linear.weight()), std::move(bias), product);
    });
  };
  return decoder;
}

Decoder Decoder::from_packed(const PackedReader& packed, const Backend& backend, at::ScalarType dtype) {
  check_dtype(dtype);
  Decoder decoder(ModelSpec::from_packed(packed), dtype, device_of(backend));
  const PackedTensors tensors(packed);
  const TensorLoader load = [&](const TensorSpec& tensor) {
    return tensors.load(tensor).to(decoder.device_, dtype, /*non_blocking=*/false, /*copy=*/true);
  };
  decoder.load_outer(load, [&](const TensorSpec& table) {
    const QuantizedRows* rows = tensors.find_rows(table);
    std::unique_ptr<PreparedMatrix> prepared = rows != nullptr ? backend.prepare_rows(*rows) : nullptr;
    return prepared == nullptr ? Table(load(table)) : Table(*rows, backend, std::move(prepared));
  });
  const auto make_linear = [&](const LinearSpec& linear, at::Tensor bias) -> std::unique_ptr<Linear> {
    if (const StructuredBinaryMatrix* matrix = tensors.find_linear(linear))
      return std::make_unique<PackedLinear>(backend, *matrix, std::move(bias));
    return std::make_unique<DenseLinear>(load(linear.weight()), std::move(bias));
  };
  for (int64_t index = 0; index < decoder.spec_.layers; ++index)
    decoder.blocks_.push_back(load_block(decoder.spec_, index, load, make_linear));
  decoder.decode_step_ = DecodeStep::make(decoder.spec_, decoder.blocks_, backend, dtype);
  return decoder;
}

void Decoder::set_tables(at::Tensor embedding, at::Tensor head) {
  outer_.embedding = Table(std::move(embedding));
  outer_.head = Table(std::move(head));
}

int64_t Decoder::bytes() const {
  int64_t total = 0;
  const auto add = [&](const at::Tensor& tensor) {
    if (tensor.defined()) total += static_cast<int64_t>(tensor.nbytes());
  };
  const auto add_norm = [&](const NormWeights& norm) {
    add(norm.weight);
    add(norm.bias);
  };
  total += outer_.embedding.bytes();
  add(outer_.position_table);
  add(outer_.project_in);
  add(outer_.project_out);
  add_norm(outer_.final_norm);
  if (!spec_.tied_head) total += outer_.head.bytes();
  for (const auto& block : blocks_) {
    if (block == nullptr) continue;
    for (const NormSpec& norm : block->norms()) add_norm(block->norm(norm.role));
    for (const LinearSpec& linear : block->linears()) total += block->linear(linear.role).bytes();
  }
  return total;
}

at::Tensor Decoder::embed(const at::Tensor& ids, int64_t first_position) const {
  at::Tensor hidden = outer_.embedding.look_up(ids, dtype_, device_);
  if (outer_.project_in.defined()) hidden = at::linear(hidden, outer_.project_in);
  if (outer_.position_table.defined()) {
    const int64_t first = spec_.position_offset + first_position;
    hidden = hidden + outer_.position_table.slice(0, first, first + ids.size(1));
  }
  return hidden;
}

std::shared_ptr<DecoderBlock> Decoder::block(int64_t index) const {
  const size_t i = static_cast<size_t>(index);
  if (i < blocks_.size() && blocks_[i] != nullptr) return blocks_[i];
  std::shared_ptr<DecoderBlock> loaded = load_block_(index);
  if (keep_blocks_) {
    blocks_.resize(static_cast<size_t>(spec_.layers));
    blocks_[i] = loaded;
  }
  return loaded;
}

at::Tensor Decoder::before_head(const at::Tensor& hidden) const {
  const at::Tensor x = spec_.has_final_norm ? apply_norm(spec_, outer_.final_norm, hidden) : hidden;
  return outer_.project_out.defined() ? at::linear(x, outer_.project_out) : x;
}

at::Tensor Decoder::logits(const at::Tensor& hidden) const {
  return outer_.head.multiply(before_head(hidden));
}

at::Tensor Decoder::forward(const at::Tensor& ids, KeyValueCache* cache) const {
  const int64_t first = cache == nullptr ? 0 : cache->length();
  const int64_t tokens = ids.size(1);
  const Positions where = positions(first, tokens);
  at::Tensor hidden = embed(ids, first);
  if (cache != nullptr && ids.numel() == 1 && decode_step_ != nullptr) {
    hidden = decode_step_->run(hidden, where, *cache);
    cache->advance(1);
    return hidden;
  }
  for (int64_t index = 0; index < spec_.layers; ++index)
    hidden = block(index)->forward(hidden, where, {}, cache);
  if (cache != nullptr) cache->advance(tokens);
  return hidden;
}

}  // namespace stbllm
