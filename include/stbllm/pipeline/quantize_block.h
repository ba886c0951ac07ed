#pragma once
// One decoder block: observe the inputs of its taps, quantize its linears, put the result in place.

#include <functional>
#include <map>
#include <optional>
#include <string>

#include "stbllm/model/decoder_block.h"
#include "stbllm/pipeline/quantize_model.h"
#include "stbllm/quantize/binarized_weight.h"

namespace stbllm {

struct QuantizedBlock {
  std::map<std::string, BinarizedWeight> linears;  ///< by full name
  std::map<std::string, at::Tensor> tensors;       ///< norms and biases that tuning changed, by full name, float32
  std::vector<LinearResult> results;               ///< in the order of the forward pass
  std::optional<TuneReport> tune;                  ///< where the block was tuned
};

/// Runs `block` over hidden (windows, seqlen, hidden) a few windows at a time and returns its outputs; `observer` may be empty.
/// `first_held_out`: windows from this index on are announced to the observer as held out.
using CalibrationObserver = std::function<void(Tap, const at::Tensor& inputs, bool holdout)>;
at::Tensor run_block(const DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden, int64_t first_held_out = -1,
                     const CalibrationObserver& observer = {});

/// Quantizes every linear of `block` on the inputs that `hidden` makes, and replaces it by the dense form of the result.
/// `pattern` gives the N:M of a linear; `on_linear` is called after each.
QuantizedBlock quantize_block(DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden, int64_t holdout,
                              const Recipe& recipe, const std::function<NmPattern(const LinearSpec&)>& pattern,
                              const std::function<void(const LinearResult&)>& on_linear);

/// Puts a quantized block's weights, norms and biases into `block`.
void install(const QuantizedBlock& quantized, DecoderBlock& block, const ModelSpec& spec);
/// Puts those of `tensors` that belong to the norm called `name` there.
void install(const std::map<std::string, at::Tensor>& tensors, NormWeights& norm, const std::string& name);

}  // namespace stbllm
