#pragma once
// The numbers of one model: config.json as its architecture's row reads it. Everything that config.json can
// ask for and this program does not implement is refused here, by key and value, before any work.

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/model/architecture.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {

enum class Activation { kSilu, kRelu, kGelu, kGeluTanh };

/// Frequencies of the rotary positions, as HF computes them.
struct Rope {
  enum class Scaling { kNone, kLinear, kLlama3 };
  double theta = 10000.0;
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;                 ///< linear, llama3
  double low_freq_factor = 1.0;        ///< llama3
  double high_freq_factor = 4.0;       ///< llama3
  int64_t original_max_positions = 0;  ///< llama3
};

struct TensorSpec {
  std::string name;  ///< full HF name
  std::vector<int64_t> shape;
};

struct LinearSpec {
  std::string name;  ///< full HF name without ".weight": "model.layers.0.self_attn.q_proj"
  Role role;
  Tap tap;
  int64_t rows = 0;  ///< out features
  int64_t cols = 0;  ///< in features
  bool has_bias = false;

  TensorSpec weight() const { return {name + ".weight", {rows, cols}}; }
  TensorSpec bias() const { return {name + ".bias", {rows}}; }
};

/// A norm of a decoder block, over the last dimension of what NormRole says.
struct NormSpec {
  std::string name;  ///< full HF name without ".weight": "model.layers.0.input_layernorm"
  NormRole role;
  int64_t width = 0;                ///< hidden or head_dim
  std::vector<TensorSpec> tensors;  ///< weight, then bias where there is one; empty when norms are not affine
};

struct ModelSpec {
  const Architecture* architecture = nullptr;
  /// Of the base model's tensors; empty in checkpoints saved without the head's class.
  std::string prefix = "model.";

  int64_t hidden = 0;
  int64_t layers = 0;  ///< decoder blocks
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t ffn = 0;
  int64_t vocab = 0;
  int64_t max_positions = 0;
  /// Differs from `hidden` where project_in and project_out stand between (OPT-350m).
  int64_t embedding_width = 0;
  int64_t position_offset = 0;  ///< row of the learned table that holds position 0
  int64_t sliding_window = 0;   ///< a token sees itself and the window - 1 tokens before it; 0: all before it
  Rope rope;
  Activation activation = Activation::kSilu;
  double norm_eps = 1e-5;
  bool norm_affine = true;  ///< norms have a weight (and a bias where Norm::kLayer)
  bool norm_first = true;   ///< false: norms come after the residual sum (OPT-350m)
  bool has_final_norm = true;
  bool tied_head = false;         ///< the head is the embedding
  std::vector<bool> slot_bias;    ///< per slot of the architecture
  std::vector<int32_t> stop_ids;  ///< tokens that end a text ("eos_token_id", one or several)

  /// Throws Error(kUnsupported) naming key and value of what is not implemented, Error(kCorrupt) for a
  /// missing key or a value of the wrong type or range.
  static ModelSpec from_config(const nlohmann::json& config);
  /// from_config, then the prefix the checkpoint uses, then check_tensors.
  static ModelSpec from_checkpoint(const Checkpoint& checkpoint);
  /// from_config, then the prefix that the file uses.
  static ModelSpec from_packed(const PackedReader& packed);
  /// Empties `prefix` when the first linear is there only without it. `has_linear` takes a name as in
  /// LinearSpec.
  void detect_prefix(const std::function<bool(const std::string& linear)>& has_linear);

  bool has_projections() const { return embedding_width != hidden; }

  /// Linears of block `block`, in the order of the forward pass.
  std::vector<LinearSpec> linears(int64_t block) const;
  /// Norms of block `block`, in the order of the architecture's slots.
  std::vector<NormSpec> norms(int64_t block) const;
  /// "model.layers.0."
  std::string block_prefix(int64_t block) const;
  /// Weight and bias (width) of the norm with this full name; empty when norms are not affine.
  std::vector<TensorSpec> norm_tensors(const std::string& name, int64_t width) const;

  TensorSpec embedding() const;       ///< (vocab, embedding_width)
  TensorSpec position_table() const;  ///< (position_offset + max_positions, hidden); learned positions only
  TensorSpec head() const;            ///< (vocab, embedding_width); the embedding when tied
  TensorSpec project_in() const;      ///< (hidden, embedding_width); has_projections() only
  TensorSpec project_out() const;     ///< (embedding_width, hidden)
  std::string final_norm() const;     ///< full name without ".weight"; its width is hidden

  /// Every tensor except the weights of the linears: norms, biases, embedding, positions, projections, head
  /// (once when tied). What a packed file keeps dense.
  std::vector<TensorSpec> other_tensors() const;
  /// Weights in all linears of all blocks.
  int64_t linear_weights() const;

  /// Every tensor is there with its shape. Throws Error(kMismatch) naming the first that is not.
  void check_tensors(const Checkpoint& checkpoint) const;
};

}  // namespace stbllm
