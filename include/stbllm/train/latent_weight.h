#pragma once
// A packed linear while it is trained: the parameters behind it, the weights of the forward pass, Adam.
//
// Each weight has a latent value in units of its scale. The forward pass uses the N largest magnitudes of a
// group with their signs and nearest levels, times scale, times exp(row gain); the gradient goes to the
// latent as if nothing was rounded (straight-through estimator). Outlier columns are exact and stay.
//
// Autograd sees a leaf of dense weights only. Everything behind it is one pass over the rows: gradients of
// latents, row gains and level gains, Adam, the next projection. Results do not depend on the number of
// threads.

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <vector>

#include "stbllm/quantize/binarized_weight.h"

namespace stbllm {

/// Adam's steps for the two kinds of parameters.
struct TuneRates {
  double gains = 0;  ///< logarithms of row scales and levels
  double codes = 0;  ///< latents, in units of the scale; 0: codes stay
};

/// The rates at step `done` of `total`: a short warm-up (Adam's first steps have no variance to go by), then
/// cosine decay.
TuneRates decayed(const TuneRates& peak, int64_t done, int64_t total);

/// Called with each tensor that steps change, under a name of its own: to keep its values, or to put kept
/// ones there.
using StateVisitor = std::function<void(const std::string& name, at::Tensor& tensor)>;

class LatentWeight {
 public:
  /// `weight` is lean (one level, or shared levels) and outlives this object; `original` (rows, cols) places
  /// pruned weights. Without `train_codes` only the gains move.
  LatentWeight(BinarizedWeight& weight, const at::Tensor& original, bool train_codes);

  /// The weights of the forward pass (rows, cols) in fast_product_dtype(), a leaf that requires a gradient.
  const at::Tensor& dense() const { return dense_; }
  /// One step of Adam from dense().grad(), which is dropped; dense() then holds the new weights.
  void step(const TuneRates& rates);
  void visit_state(const std::string& name, const StateVisitor& visit);
  /// Goes on as after `steps` steps, when visit_state() has put back what they left.
  void resume(int64_t steps);
  /// Writes codes, row scales and levels, in the precision of the packed file, to the weight. Returns the
  /// number of symbols that differ from those at the start.
  int64_t write_back();

 private:
  struct Moments {
    at::Tensor mean, square;
  };
  /// Fills dense_ and, unless null, symbols (rows, cols) from the parameters.
  void project(int8_t* symbols = nullptr);
  std::vector<float> levels_now() const;

  BinarizedWeight& weight_;
  bool train_codes_;
  int64_t steps_ = 0;
  at::Tensor first_symbols_,
      first_scales_;  // of the weight: scales are row scales, or all of them when each is stored
  std::vector<float> levels_;
  at::Tensor unit_scales_;  // (rows, column blocks): of level 1, before the row gain
  at::Tensor latent_;       // (rows, cols)
  at::Tensor row_gain_;     // (rows): logarithm of a factor
  at::Tensor level_gain_;   // (levels): logarithm of a factor; stays 0 when there is one level
  Moments latent_moments_, row_moments_, level_moments_;
  at::Tensor outlier_values_;  // (rows, outliers)
  std::vector<int32_t> outlier_columns_;
  at::Tensor dense_;
};

}  // namespace stbllm
