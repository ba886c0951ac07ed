#pragma once
// A quantized block in training: what tune (one block against its own outputs) and distill (all blocks against the logits)
// have in common.

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "stbllm/pipeline/latent_weight.h"
#include "stbllm/pipeline/quantize_block.h"

namespace torch::optim {
class Optimizer;
}

namespace stbllm {

/// Tensors under Adam that are not behind codes: norms and biases.
class TrainedVectors {
 public:
  /// Replaces `tensor` by a float32 leaf that is trained under `name`; does nothing when it is undefined.
  void add(at::Tensor& tensor, const std::string& name);
  /// Makes every norm tensor of `norm`, called `name`, trainable.
  void add(NormWeights& norm, const std::string& name);
  void step(double rate);
  /// Copies of the trained values, by name.
  void write_back(std::map<std::string, at::Tensor>& tensors) const;

 private:
  std::vector<std::pair<std::string, at::Tensor>> named_;
  std::shared_ptr<torch::optim::Optimizer> adam_;  // made at the first step
};

class TrainedBlock {
 public:
  /// `block` holds the dense weights; its linears, norms and biases are replaced by trainable forms of `quantized`, until
  /// install() puts plain ones there. Both outlive this object.
  TrainedBlock(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized, bool train_codes);

  /// Adam on everything that the last backward pass reached.
  void step(const TuneRates& rates);
  /// Copies the values of now to the quantized block. Returns the share of weights whose symbol changed since the start.
  double write_back();

 private:
  QuantizedBlock& quantized_;
  std::vector<LatentWeight> weights_;  // in the order of block_.linears()
  TrainedVectors vectors_;
};

}  // namespace stbllm
