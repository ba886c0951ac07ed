#pragma once
// One token of one sequence through all blocks of a packed model, in one parallel region over memory that
// exists already: DecoderBlock::forward() with the same rounding, and so the same bits, without starting
// threads ten times per block and without libtorch, whose calls take longer than the work of a small model.
// DecoderBlock is the readable twin.

#include <ATen/core/Tensor.h>

#include <memory>
#include <span>
#include <vector>

#include "stbllm/backend/backend.h"
#include "stbllm/base/parallel.h"
#include "stbllm/model/decoder_block.h"

namespace stbllm {

class DecodeStep {
 public:
  /// Null where a block has something else than norms in front of its branches, a gated SiLU or a plain ReLU,
  /// and packed linears that `backend` plans products of, in bfloat16 on the CPU. Blocks and backend must
  /// outlive the result.
  static std::unique_ptr<DecodeStep> make(const ModelSpec& spec,
                                          std::span<const std::shared_ptr<DecoderBlock>> blocks,
                                          const Backend& backend, at::ScalarType dtype);

  /// hidden (1, 1, hidden) that enters block 0 -> what leaves the last one. `positions` are those of the
  /// token behind what `cache` holds; the caller advances the cache.
  at::Tensor run(const at::Tensor& hidden, const Positions& positions, KeyValueCache& cache);

 private:
  /// The weights beside the packed ones, null where there are none.
  struct Norm {
    bool exists;
    const uint16_t *weight, *bias;
  };
  struct Block {
    Norm norm[kNormRoleCount];
    const uint16_t* bias[kRoleCount];
  };

  explicit DecodeStep(const ModelSpec& spec);
  bool plan(std::span<const std::shared_ptr<DecoderBlock>> blocks, const Backend& backend);
  void pass_block(int64_t index, const Positions& positions, KeyValueCache& cache,
                  const TeamPlace& team) const;
  void normalize(const Norm& norm, const uint16_t* x, uint16_t* y, int64_t width, int64_t row) const;
  void enter_branch(const TeamPlace& team, const Norm& norm) const;
  void leave_branch(const TeamPlace& team, const uint16_t* bias) const;
  void append_heads(int64_t index, const Positions& positions, KeyValueCache& cache,
                    const TeamPlace& team) const;
  void pass_activation(const Block& block, const TeamPlace& team) const;

  ModelSpec spec_;
  std::vector<Block> blocks_;
  /// hidden states, what a branch reads and gives (hidden); q, k, v and what attention makes of them by
  /// heads; gates, which a plain MLP has none of, and what they let pass (ffn).
  at::Tensor hidden_, input_, branch_, queries_, keys_, values_, mixed_, gate_, up_, middle_;
  at::Tensor parts_;                           // of attention
  std::unique_ptr<PlannedProducts> products_;  // four sets for each block, by Tap
  Barrier barrier_;
};

}  // namespace stbllm
