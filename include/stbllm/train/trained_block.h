#pragma once
// A quantized block in training: what tune (one block against its own outputs) and distill (all blocks
// against the logits) have in common.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/train/latent_weight.h"

namespace stbllm {

/// Norms and biases under Adam. The weights of a norm move by factors, w = w0 exp(g): a dimension that
/// carries massive activations has a weight thousands of times smaller than its neighbours, which a common
/// step would wipe out. Biases move by shifts in units of their root mean square.
class TrainedVectors {
 public:
  /// Replaces every tensor of `norm`, called `name`, by a float32 leaf that is trained.
  void add_norm(NormWeights& norm, const std::string& name);
  /// The same for a bias; does nothing when it is undefined.
  void add_bias(at::Tensor& bias, const std::string& name);
  /// One step of Adam from the gradients, which are dropped.
  void step(double rate);
  void visit_state(const StateVisitor& visit);
  void resume(int64_t steps);  ///< as LatentWeight::resume
  /// Copies of the trained values on the CPU, by name.
  void write_back(std::map<std::string, at::Tensor>& tensors) const;

 private:
  struct Vector {
    std::string name;
    at::Tensor leaf, original;
    at::Tensor unit;  // of a shift; undefined where the vector moves by factors
    at::Tensor moved, mean, square;
  };
  void add(at::Tensor& tensor, const std::string& name, bool by_factors);
  static void update_leaf(Vector& v);
  std::vector<Vector> vectors_;
  int64_t steps_ = 0;
};

/// Tokens that one step of training sees where windows are not longer: few, so that there are many steps.
inline constexpr int64_t kTokensPerStep = 512;
inline int64_t windows_per_step(int64_t seqlen) { return std::max<int64_t>(1, kTokensPerStep / seqlen); }

/// Mean over windows of loss(first, count), which is the mean of `count` windows from `first` on: over the
/// last `holdout` of `windows`, or over all when there are none. `step` windows at a time.
template <typename Loss>
double held_out_mean(int64_t windows, int64_t holdout, int64_t step, const Loss& loss) {
  const int64_t from = holdout > 0 ? windows - holdout : 0;
  double sum = 0;
  for (int64_t first = from; first < windows; first += step) {
    const int64_t count = std::min(step, windows - first);
    sum += loss(first, count) * static_cast<double>(count);
  }
  return sum / static_cast<double>(windows - from);
}

class TrainedBlock {
 public:
  /// `block` holds the dense weights; its linears, norms and biases are replaced by trainable forms of
  /// `quantized`, until install() puts plain ones there. Both outlive this object.
  TrainedBlock(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized, bool train_codes);

  /// Adam on everything that the last backward pass reached.
  void step(const TuneRates& rates);
  void visit_state(const StateVisitor& visit);
  void resume(int64_t steps);  ///< as LatentWeight::resume
  /// Copies the values of now to the quantized block. Returns the share of weights whose symbol changed since
  /// the start.
  double write_back();

 private:
  QuantizedBlock& quantized_;
  std::vector<std::string> names_;     // of the block's linears
  std::vector<LatentWeight> weights_;  // in the same order
  TrainedVectors vectors_;
};

}  // namespace stbllm
