#pragma once
// What is left of a decoder block once its linears are quantized, and how it comes into a block.

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "stbllm/calibrate/results.h"
#include "stbllm/model/decoder_block.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/quantize/binarized_weight.h"

namespace stbllm {

struct QuantizedBlock {
  std::map<std::string, BinarizedWeight> linears;  ///< by full name; without those that keep their weights
  std::map<std::string, at::Tensor>
      tensors;                        ///< norms and biases that training changed, by full name, float32
  std::vector<LinearResult> results;  ///< in the order of the forward pass
  std::optional<TuneReport> tune;     ///< where the block was tuned
};

/// Puts one linear's quantized weight into `block`; its bias stays.
void install(const BinarizedWeight& weight, DecoderBlock& block, Role role);
/// Puts a quantized block's weights, norms and biases into `block`.
void install(const QuantizedBlock& quantized, DecoderBlock& block, const ModelSpec& spec);
/// Puts those of `tensors` that belong to the norm called `name` there.
void install(const std::map<std::string, at::Tensor>& tensors, NormWeights& norm, const std::string& name);

/// Which of `processes` quantizes which linear: each in turn, the largest first, goes to the one with the
/// least to do.
std::vector<int> divide(const std::vector<LinearSpec>& linears, int processes);
/// Gives every process the quantized linears and their results, in the order of `linears`; owners[i] is the
/// one that has linears[i].
void exchange(std::map<std::string, BinarizedWeight>& weights, std::vector<LinearResult>& results,
              const std::vector<LinearSpec>& linears, const std::vector<int>& owners,
              const ProcessGroup& group);

}  // namespace stbllm
