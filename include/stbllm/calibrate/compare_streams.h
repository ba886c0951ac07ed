#pragma once
// How far hidden states are from those of the dense model.

#include "stbllm/calibrate/results.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/processes/process_group.h"

namespace stbllm {

/// Of the windows of two streams that are not extra, a window at a time, over all processes.
BlockResult compare_streams(const HiddenStream& own, const HiddenStream& dense, const ProcessGroup& group);

/// BlockResult::relative_error of hidden states (windows, seqlen, hidden).
double relative_hidden_error(const at::Tensor& own, const at::Tensor& dense);

}  // namespace stbllm
