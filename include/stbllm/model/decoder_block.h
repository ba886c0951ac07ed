#pragma once
// One decoder block, the only forward pass of this program:
//
//   h = h + o(attention(q(n), k(n), v(n)))      n = attn_norm(h)
//   h = h + mlp(mlp_norm(h))                    mlp(n) = down(act(gate(n)) * up(n))  or  down(act(up(n)))
//
// and with norms after the sum instead of before the branch where the spec says so. Where the architecture
// has norms of queries and keys, each head of q(n) and k(n) passes through them before it is rotated. Works
// in float32 and bfloat16, on any device, and under autograd.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "stbllm/model/linear.h"
#include "stbllm/model/model_spec.h"

namespace stbllm {

/// Angular frequencies (head_dim / 2), float32 at every step as HF computes them: its rounding is part of the
/// model.
at::Tensor rope_frequencies(const ModelSpec& spec);

/// Where the tokens of a forward pass stand, rotary angles and the attention mask, which all blocks share;
/// and the dtype of what a block computes between a norm and the sum behind it.
struct Positions {
  /// Tokens first .. first + count - 1 of every sequence of the batch, in the given dtype and device.
  Positions(const ModelSpec& spec, int64_t first, int64_t count, at::ScalarType dtype, at::Device device);

  int64_t first;
  int64_t count;
  at::Tensor cos;  ///< (count, head_dim), of every angle; undefined unless positions are rotary
  at::Tensor sin;  ///< (count, head_dim)
  /// (count, first + count) in the dtype of the activations, for libtorch's attention: 0 where a query sees a
  /// key and -inf elsewhere. It is made when it is first asked for, and undefined where libtorch needs none:
  /// when the tokens are the first of their sequence and no window matters, or when there is just one token.
  const at::Tensor& mask() const;
  at::ScalarType dtype() const { return c10::typeMetaToScalarType(options_.dtype()); }

 private:
  int64_t window_;
  at::TensorOptions options_;
  mutable at::Tensor mask_;
};

/// Keys and values of the tokens so far, for every block, so that each token passes the model once.
class KeyValueCache {
 public:
  KeyValueCache(const ModelSpec& spec, int64_t batch, int64_t capacity, at::ScalarType dtype,
                at::Device device);

  int64_t length() const { return length_; }
  /// Writes the keys and values (batch, kv_heads, n, head_dim) of block `block` at positions length() ..
  /// length() + n - 1 and replaces both by views of all length() + n. Throws Error(kUsage) when they exceed
  /// the capacity.
  void append(int64_t block, at::Tensor& keys, at::Tensor& values);
  /// Throws Error(kUsage) when `tokens` more exceed the capacity.
  void check_room(int64_t tokens) const;
  /// To be called once `tokens` more have been appended in every block.
  void advance(int64_t tokens) { length_ += tokens; }
  /// The same tokens for each of `batch` sequences, with room for `capacity` (at least length()). This cache
  /// is one of a single sequence.
  KeyValueCache repeated(int64_t batch, int64_t capacity) const;
  /// All memory of a block, for those who write it themselves: (batch, kv_heads, capacity(), head_dim).
  const at::Tensor& keys(int64_t block) const { return keys_[static_cast<size_t>(block)]; }
  const at::Tensor& values(int64_t block) const { return values_[static_cast<size_t>(block)]; }
  int64_t capacity() const { return capacity_; }

 private:
  KeyValueCache() = default;

  int64_t capacity_ = 0;
  int64_t length_ = 0;
  std::vector<at::Tensor> keys_;  // per block: (batch, kv_heads, capacity, head_dim)
  std::vector<at::Tensor> values_;
};

/// Weight and bias of a norm; undefined where there is none.
struct NormWeights {
  at::Tensor weight;
  at::Tensor bias;
};
/// RMS norm as HF computes it (statistics in float32, the weight applied in x's dtype) or layer norm,
/// whichever the architecture has, over the last dimension of x.
at::Tensor apply_norm(const ModelSpec& spec, const NormWeights& norm, const at::Tensor& x);

/// Is called with the input (batch, tokens, cols) of every tap, once per forward, in the order of the forward
/// pass.
using TapObserver = std::function<void(Tap, const at::Tensor& input)>;

/// A forward pass that has stopped at a tap.
struct BlockPass {
  at::Tensor hidden;  ///< (batch, tokens, hidden): what the next branch is added to
  at::Tensor input;   ///< (batch, tokens, cols): of the tap; undefined behind the last one
};

class DecoderBlock {
 public:
  /// Linears and the weights of norms are set one by one; forward needs all of them. `spec` is copied.
  DecoderBlock(const ModelSpec& spec, int64_t index);

  /// hidden (batch, tokens, hidden) -> the same shape and dtype. `positions` has count == tokens. With a
  /// cache, positions.first == cache->length(); the caller advances the cache after the last block.
  at::Tensor forward(const at::Tensor& hidden, const Positions& positions, const TapObserver& observer = {},
                     KeyValueCache* cache = nullptr) const;

  /// The same from tap to tap, so that linears can be replaced in between: begin() stops at the first tap,
  /// and proceed() goes on from `from`, where the pass stands, to the next one. Behind Tap::kMlpMid `hidden`
  /// is what leaves the block.
  BlockPass begin(const at::Tensor& hidden, const Positions& positions) const;
  void proceed(BlockPass& pass, Tap from, const Positions& positions, KeyValueCache* cache = nullptr) const;

  int64_t index() const { return index_; }
  const std::vector<LinearSpec>& linears() const { return linear_specs_; }
  const Linear& linear(Role role) const;
  /// linear(role) for those who need its dense weight, such as the quantizer. A packed linear is a logic
  /// error.
  const DenseLinear& dense(Role role) const;
  void set_linear(Role role, std::unique_ptr<Linear> linear);
  const std::vector<NormSpec>& norms() const { return norm_specs_; }
  /// The norm of this role, one of norms(); mutable, since loading sets it and training changes it.
  NormWeights& norm(NormRole role);

 private:
  /// What the attention branch reads (batch, tokens, hidden) -> what its output projection reads.
  at::Tensor mix(const at::Tensor& x, const Positions& positions, KeyValueCache* cache) const;
  /// Softmax attention: queries, keys and values (batch, heads or kv_heads, tokens, head_dim) -> (batch,
  /// tokens, heads * head_dim).
  at::Tensor attend(const at::Tensor& queries, at::Tensor keys, at::Tensor values,
                    const Positions& positions) const;
  /// What the MLP reads -> what its down projection reads (batch, tokens, ffn).
  at::Tensor mlp_middle(const at::Tensor& x) const;
  /// What a branch reads of the hidden states, and the hidden states with its result: the norm stands in
  /// front of the branch or behind the sum.
  at::Tensor branch_input(NormRole norm, const at::Tensor& hidden, at::ScalarType dtype) const;
  at::Tensor add_branch(NormRole norm, const at::Tensor& hidden, const at::Tensor& branch) const;
  /// x through the block's norm of this role, or x itself where there is none.
  at::Tensor normalize(NormRole role, const at::Tensor& x) const;

  ModelSpec spec_;
  int64_t index_;
  std::vector<LinearSpec> linear_specs_;
  std::vector<NormSpec> norm_specs_;
  // By role; empty where the architecture has none.
  std::array<std::optional<NormWeights>, kNormRoleCount> norms_;
  std::array<std::unique_ptr<Linear>, kRoleCount> linears_;
};

}  // namespace stbllm
