#pragma once
// What a linear layer needs to know about its inputs: H = (2/T) sum_t w_t x_t x_t^T, and where they come from
// quantized layers, what separates them from the dense model.

#include <ATen/ATen.h>

#include <functional>

#include "stbllm/quantize/method.h"

namespace stbllm {

/// Statistics of the inputs of one tap, shared by all linears that read it.
struct InputStats {
  at::Tensor hessian;          ///< (cols, cols) float32, not damped
  at::Tensor holdout_hessian;  ///< the same over windows that `hessian` has not seen; undefined when there
                               ///< are none
  /// C = (2/T) sum_t w_t (d_t - x_t) x_t^T, (cols, cols) float32, d the dense model's inputs; undefined where
  /// these are not known.
  at::Tensor input_drift;
  /// R = (2/T) sum_t w_t c_t (e_t - h_t) x_t^T, (hidden, cols) float32, where the outputs are added to hidden
  /// states: h are those of the quantized model and e of the dense one. Else undefined. c_t = min(1, median
  /// ||e - h|| / ||e_t - h_t||), the median over the token's window: the few tokens whose hidden states are
  /// huge would decide R by themselves. (SmolLM2-135M at 1.25 bits has a perplexity of 365 and 201 on
  /// Wikitext-2's test and validation splits, 3246 and 241 with c_t = 1, 435 and 368 without R.)
  at::Tensor hidden_drift;
  int64_t tokens = 0;  ///< T behind `hessian`

  /// S_j^2 = sum_t x_tj^2, (cols).
  at::Tensor feature_norm_sq() const { return hessian.diagonal() * (static_cast<double>(tokens) / 2); }
};

/// What the dense model has for the same tokens, minus what the quantized one has.
struct Drift {
  at::Tensor inputs;  ///< d - x, (..., tokens of a window, cols); undefined where d is not known
  at::Tensor hidden;  ///< e - h, (..., tokens of a window, hidden); undefined where nothing is added to h
};

struct StatsOptions {
  bool token_weights = false;  ///< each token counts w_t = min(1, 3 median ||x|| / ||x_t||), the median over
                               ///< its window; else 1
  /// As rounded_products.h says. SmolLM2-135M by `stbllm` from 16 x 2048 tokens of C4, seeds 0, 1 and 2
  /// (`eval-ppl --windows 10 --dtype bfloat16`): perplexities of 116.9, 100.0 and 89.5 on Wikitext-2's test
  /// split and 77.5, 77.5 and 65.5 on validation with it; 105.9, 105.8, 91.4 and 76.0, 74.2, 66.8 without. On
  /// average 1 % more, which is less than what a seed changes.
  bool rounded_products = false;
};
/// Those of a method. Methods by regions sum as they were published: in float32, all tokens alike.
inline StatsOptions stats_options(const Method& method) {
  const auto* lean = std::get_if<LeanMethod>(&method);
  return {.token_weights = lean != nullptr && lean->token_weights, .rounded_products = lean != nullptr};
}

/// Sums up x x^T over batches of inputs, on their device. The order of calls, the device and, with
/// `rounded_products`, the processor decide the rounding, nothing else does.
class StatsAccumulator {
 public:
  StatsAccumulator(int64_t cols, const StatsOptions& options);
  /// inputs: (..., tokens of a window, cols), float32 or bfloat16. Held-out batches go to a matrix of their
  /// own. `drift` comes with every call that is not held out or with none.
  void add(const at::Tensor& inputs, bool holdout, const Drift& drift = {});
  /// Takes in what the accumulators of other processes have seen: `add_up` replaces a tensor in host memory
  /// by its sum over all processes.
  void merge(const std::function<void(at::Tensor&)>& add_up);
  /// On the device of the inputs.
  InputStats finish();

 private:
  /// x x^T, on and above the diagonal.
  struct Sum {
    at::Tensor squares;
    int64_t tokens = 0;
  };
  Sum seen_, held_out_;
  at::Tensor input_drift_, hidden_drift_;  // times x^T, over the tokens of seen_
  int64_t cols_;
  StatsOptions options_;
};

}  // namespace stbllm
