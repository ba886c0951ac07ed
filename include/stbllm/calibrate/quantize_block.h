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

/// What the plan decides for each linear, by full name.
using Plan = std::map<std::string, LinearPlan>;

/// Quantizes every linear of `block` on the inputs that `stream` makes, and replaces it by the dense form of
/// the result; the stream stays. `on_linear` is called after each. Several processes bring windows of their
/// own, share the work and end with the same block.
QuantizedBlock quantize_block(DecoderBlock& block, const ModelSpec& spec, const HiddenStream& stream,
                              const Method& method, const Plan& plan,
                              const std::function<void(const LinearResult&)>& on_linear,
                              const ProcessGroup& group = {});

/// Throws Error(kCorrupt) where the outputs of a linear were not finite.
void check_outputs(const LinearReport& report, const std::string& linear);

}  // namespace stbllm
