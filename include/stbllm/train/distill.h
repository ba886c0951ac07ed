#pragma once
// Distillation, the last stage of training: the whole packed model against the logits of the dense one, on
// the calibration windows and perhaps more.
//
//   loss = mean_t KL(softmax(dense logits_t) || softmax(packed logits_t))
//
// A step sees kTokensPerStep tokens: a forward pass that keeps what autograd needs of every block, then block
// by block from the last to the first its backward pass and its step, after which what was kept of it is
// gone.

#include <vector>

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/model/decoder.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/recipe/recipe.h"
#include "stbllm/train/training_store.h"

namespace stbllm {

/// Tokens whose logits of both models exist at a time.
inline constexpr int64_t kTokensPerDivergence = 256;

struct DistillRequest {
  /// Has the tables of the packed file and yields dense blocks.
  Decoder& student;
  /// The dense model, and what leaves its last block.
  const Decoder& teacher;
  const HiddenStream& teacher_states;
  /// How the first blocks of the student are quantized.
  std::vector<QuantizedBlock>& blocks;
  const TrainingStage& stage;
};

/// Optimises the request's blocks in place (the final norm becomes one of the last block's tensors). The
/// held-out windows of the teacher's stream only judge: the best epoch on them is kept. Deterministic.
///
/// Now and then, and before it throws Error(kInterrupted), the state goes to `store`, from where the next
/// call goes on.
DistillReport distill(const DistillRequest& request, TrainingStore& store);

}  // namespace stbllm
