#pragma once
// One decoder block: observe the inputs of its taps, quantize its linears, put the result in place.

#include <functional>
#include <map>
#include <string>

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/quantize/quantize_linear.h"

namespace stbllm {

/// What the plan decides for each linear, by full name. A linear that is not in it keeps its weights.
using Plan = std::map<std::string, LinearPlan>;

/// Those of `linears` that `plan` quantizes.
std::vector<LinearSpec> planned(const std::vector<LinearSpec>& linears, const Plan& plan);

/// The hidden states in front of a block.
struct BlockStreams {
  HiddenStream& quantized;        ///< behind quantized blocks
  HiddenStream* dense = nullptr;  ///< the dense model's, of the same windows; null where it does not go along
  DecoderBlock* dense_block = nullptr;  ///< the same block, which stays dense; needed by asymmetric methods
};

/// Quantizes the planned linears of `block` on the inputs that the quantized stream makes, and replaces it by
/// the dense form of the result; `on_linear` is called after each. Sequential methods go from tap to tap, so
/// that a linear sees what the quantized ones in front of it make. Both streams are then behind the block.
/// Several processes bring windows of their own, share the work and end with the same block.
QuantizedBlock quantize_block(DecoderBlock& block, const BlockStreams& streams, const Method& method,
                              const Plan& plan, const std::function<void(const LinearResult&)>& on_linear,
                              const ProcessGroup& group = {});

/// Takes the streams through a block whose linears are in place already, with the very roundings of
/// quantize_block().
void pass_block(const DecoderBlock& block, const BlockStreams& streams, const Method& method);

/// Throws Error(kCorrupt) where the outputs of a linear were not finite.
void check_outputs(double output_error, const std::string& linear);

}  // namespace stbllm
