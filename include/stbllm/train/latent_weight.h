#pragma once
// A packed linear while it is trained: the parameters behind it, the weights of the forward pass, Adam.
//
// The parameters and what a step does to them are in latent_state.h. Outlier columns are exact and stay.
//
// Autograd sees a leaf of dense weights only. Everything behind it is one pass over the rows: gradients of
// latents, row gains and level gains, Adam, the next projection. On the CPU results do not depend on the
// number of threads.

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "stbllm/quantize/binarized_weight.h"
#include "stbllm/train/latent_state.h"

namespace stbllm {

/// The rates at step `done` of `total`: a short warm-up (Adam's first steps have no variance to go by), then
/// cosine decay.
TuneRates decayed(const TuneRates& peak, int64_t done, int64_t total);

/// Called with each tensor that steps change, under a name of its own: to keep its values, or to put kept
/// ones there.
using StateVisitor = std::function<void(const std::string& name, at::Tensor& tensor)>;

class LatentWeight {
 public:
  /// `weight` is lean (one level, or shared levels), lies on the CPU and outlives this object; `original`
  /// (rows, cols) places pruned weights, and training happens on its device. Without `train_codes` only the
  /// gains move.
  LatentWeight(BinarizedWeight& weight, const at::Tensor& original, bool train_codes);

  /// The weights of the forward pass (rows, cols) in fast_product_dtype(), a leaf that requires a gradient.
  const at::Tensor& dense() const { return state_.dense; }
  /// One step of Adam from dense().grad(), which is dropped; dense() then holds the new weights.
  void step(const TuneRates& rates);
  void visit_state(const std::string& name, const StateVisitor& visit);
  /// Goes on as after `steps` steps, when visit_state() has put back what they left.
  void resume(int64_t steps);
  /// Writes codes, row scales and levels, in the precision of the packed file, to the weight. Returns the
  /// number of symbols that differ from those at the start.
  int64_t write_back();

 private:
  /// Fills the state's dense and, where it is defined, `symbols`, int8 (rows, cols).
  void project(const at::Tensor& symbols = {}) const;

  BinarizedWeight& weight_;
  LatentState state_;
  int64_t steps_ = 0;
  // Of the weight at the start; scales are row scales, or all of them when each is stored.
  at::Tensor first_symbols_, first_scales_;
};

}  // namespace stbllm
