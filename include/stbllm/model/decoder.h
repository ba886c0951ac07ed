#pragma once
// A causal language model: embedding and positions, decoder blocks, final norm, head. Blocks are asked for
// one at a time, so that a dense checkpoint needs the memory of one block only.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/model/decoder_block.h"
#include "stbllm/model/table.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {

class DecodeStep;

struct DecoderOptions {
  at::ScalarType dtype = at::kFloat;  ///< of weights and activations: float32 or bfloat16
  /// In which dense linears multiply; `dtype` where unset. The weights are kept in `dtype` as well.
  std::optional<at::ScalarType> product_dtype = std::nullopt;
  at::Device device = at::kCPU;
  bool keep_blocks = false;  ///< a block that is loaded (and perhaps changed by its user) stays in memory
};

class Decoder {
 public:
  /// A dense model. What stands outside the blocks is loaded here; a block is loaded and converted when it is
  /// asked for, from a copy of `checkpoint`, whose files stay mapped. Throws Error(kUnsupported | kMismatch)
  /// before any weight is read, and Error(kCorrupt) where a tensor holds values that are not finite.
  static Decoder from_checkpoint(const Checkpoint& checkpoint, const DecoderOptions& options = {});
  /// A packed model. All blocks are prepared here, once, and the reader is not needed afterwards. Linears
  /// that are not packed but present as dense tensors `<name>.weight` run dense. `backend` must outlive the
  /// decoder and decides the device. Throws Error(kMismatch) naming a tensor that is missing or has another
  /// shape, and Error(kCorrupt) where the file's configuration is no JSON.
  static Decoder from_packed(const PackedReader& packed, const Backend& backend,
                             at::ScalarType dtype = at::kFloat);

  const ModelSpec& spec() const { return spec_; }
  at::ScalarType dtype() const { return dtype_; }
  at::Device device() const { return device_; }
  /// Memory of all that stays loaded: tables, positions, projections, norms, and kept or packed blocks.
  int64_t bytes() const;

  /// The tables (vocab, embedding_width) at both ends of a dense decoder; the same tensor when tied. The
  /// quantizer replaces them by what their quantized rows stand for.
  const at::Tensor& embedding() const { return outer_.embedding.dense(); }
  const at::Tensor& head() const { return outer_.head.dense(); }
  void set_tables(at::Tensor embedding, at::Tensor head);

  /// Mutable for the quantizer, which may train it.
  NormWeights& final_norm() { return outer_.final_norm; }

  /// ids (batch, tokens), int32 or int64 -> hidden states (batch, tokens, hidden) that enter block 0.
  at::Tensor embed(const at::Tensor& ids, int64_t first_position = 0) const;
  Positions positions(int64_t first, int64_t count) const { return {spec_, first, count, dtype_, device_}; }
  /// Block `index`. The caller owns it, together with the decoder where blocks are kept.
  std::shared_ptr<DecoderBlock> block(int64_t index) const;
  /// hidden (batch, tokens, hidden) that leaves the last block -> what the head multiplies (batch, tokens,
  /// embedding_width).
  at::Tensor before_head(const at::Tensor& hidden) const;
  /// hidden (batch, tokens, hidden) that leaves the last block -> logits (batch, tokens, vocab), in dtype()
  /// or float32 as Table::multiply gives them.
  at::Tensor logits(const at::Tensor& hidden) const;

  /// ids (batch, tokens) -> hidden states (batch, tokens, hidden) that leave the last block. With a cache,
  /// ids continue what it holds, and it is advanced. A single token goes through all blocks in one parallel
  /// region where has_decode_step(), with the same bits.
  at::Tensor forward(const at::Tensor& ids, KeyValueCache* cache = nullptr) const;
  bool has_decode_step() const { return decode_step_ != nullptr; }
  KeyValueCache make_cache(int64_t batch, int64_t capacity) const {
    return {spec_, batch, capacity, dtype_, device_};
  }

 private:
  using BlockSource = std::function<std::shared_ptr<DecoderBlock>(int64_t index)>;
  using TensorLoader = std::function<at::Tensor(const TensorSpec&)>;
  using TableLoader = std::function<Table(const TensorSpec&)>;
  struct Outer {                // all that stands outside the blocks; undefined where the model has none
    Table embedding;            // (vocab, embedding_width)
    at::Tensor position_table;  // (position_offset + max_positions, hidden)
    at::Tensor project_in;      // (hidden, embedding_width)
    at::Tensor project_out;     // (embedding_width, hidden)
    NormWeights final_norm;
    Table head;  // (vocab, embedding_width)
  };

  Decoder(ModelSpec spec, at::ScalarType dtype, at::Device device)
      : spec_(std::move(spec)), dtype_(dtype), device_(device) {}

  void load_outer(const TensorLoader& load, const TableLoader& load_table);

  ModelSpec spec_;
  at::ScalarType dtype_;
  at::Device device_;
  Outer outer_;
  BlockSource load_block_;
  bool keep_blocks_ = false;
  mutable std::vector<std::shared_ptr<DecoderBlock>> blocks_;  // kept or packed ones; null: not loaded yet
  std::shared_ptr<DecodeStep> decode_step_;                    // of a packed model that it takes, else null
};

}  // namespace stbllm
