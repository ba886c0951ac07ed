#pragma once
// Distillation, the last stage of training: the whole packed model against the logits of the dense one, on
// the calibration windows and perhaps more.
//
//   loss = mean_t KL(softmax(dense logits_t) || softmax(packed logits_t))
//
// A step sees kTokensPerStep tokens: a forward pass that keeps what autograd needs of every block, then block
// by block from the last to the first its backward pass and its step, after which what was kept of it is
// gone.

#include <ATen/core/Tensor.h>

#include <vector>

#include "stbllm/model/decoder.h"
#include "stbllm/pipeline/quantize_block.h"
#include "stbllm/pipeline/work_directory.h"

namespace stbllm {

/// Tokens whose logits of both models exist at a time.
inline constexpr int64_t kTokensPerDivergence = 256;

/// `student` has the tables of the packed file and yields dense blocks; the first of them are quantized as
/// `blocks` say, and these are optimised in place (the final norm becomes one of the last block's tensors).
/// `teacher` is the dense model. ids (windows, seqlen); teacher_hidden (windows, seqlen, hidden): what leaves
/// the teacher's last block. The last `holdout` windows only judge: the best epoch on them is kept.
/// Deterministic.
///
/// Now and then, and before it throws Error(kInterrupted), the state is kept in `work`, from where the next
/// call with the same `inputs` goes on.
DistillReport distill(Decoder& student, const Decoder& teacher, std::vector<QuantizedBlock>& blocks,
                      const at::Tensor& ids, const at::Tensor& teacher_hidden, int64_t holdout,
                      const Recipe& recipe, const WorkDirectory& work, const nlohmann::json& inputs);

}  // namespace stbllm
