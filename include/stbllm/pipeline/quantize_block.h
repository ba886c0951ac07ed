#pragma once
// One decoder block: observe the inputs of its taps, quantize its linears, put the result in place.

#include <array>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "stbllm/model/decoder_block.h"
#include "stbllm/pipeline/process_group.h"
#include "stbllm/pipeline/results.h"
#include "stbllm/quantize/binarized_weight.h"
#include "stbllm/quantize/input_stats.h"

namespace stbllm {

/// What the hidden states of calibration windows are kept in between blocks. Blocks compute in float32, and
/// the functions below take either; a rounding of 2^-9 is far below what one quantized block adds.
inline constexpr at::ScalarType kHiddenDtype = at::kBFloat16;

/// The recipe of each linear, by full name.
using Plan = std::map<std::string, Recipe>;

struct QuantizedBlock {
  std::map<std::string, BinarizedWeight> linears;  ///< by full name
  std::map<std::string, at::Tensor> tensors;  ///< norms and biases that tuning changed, by full name, float32
  std::vector<LinearResult> results;          ///< in the order of the forward pass
  std::optional<TuneReport> tune;             ///< where the block was tuned
};

/// Runs `block` over hidden (windows, seqlen, hidden) a few windows at a time and returns its outputs,
/// float32.
at::Tensor run_block(const DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden);

/// The statistics of all taps of a block.
class TapStats {
 public:
  TapStats(const std::vector<LinearSpec>& linears, bool token_weights);
  void add(Tap tap, const at::Tensor& inputs, bool holdout) {
    accumulators_[static_cast<size_t>(tap)]->add(inputs, holdout);
  }
  /// Summed up over the processes of `group`. Once; the sums are given away.
  std::array<InputStats, kTapCount> finish(const ProcessGroup& group = {});

 private:
  std::array<std::optional<StatsAccumulator>, kTapCount> accumulators_;
};

/// Gets the inputs of a tap, float32 (windows, seqlen, cols), for some windows that are all held out or none.
using CalibrationObserver = std::function<void(Tap, const at::Tensor& inputs, bool holdout)>;
/// Shows what the taps of `block` see of `hidden`, the last `holdout` windows of which are held out.
void observe_block(const DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden,
                   int64_t holdout, const CalibrationObserver& observer);
/// Puts the outputs of `block` in place of `hidden`; there is never a second copy. `observer` may be empty.
void advance(const DecoderBlock& block, const ModelSpec& spec, at::Tensor& hidden,
             const CalibrationObserver& observer = {}, int64_t holdout = 0);
/// Compares two streams of hidden states (windows, seqlen, hidden), a window at a time, over all processes.
BlockResult compare_hidden(const at::Tensor& hidden, const at::Tensor& dense, const ProcessGroup& group = {});

/// Quantizes every linear of `block` on the inputs that `hidden` makes, and replaces it by the dense form of
/// the result. `plan` has the recipe of each, `recipe` what they share; `on_linear` is called after each.
/// Several processes bring windows of their own, share the work and end with the same block.
QuantizedBlock quantize_block(DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden,
                              int64_t holdout, const Recipe& recipe, const Plan& plan,
                              const std::function<void(const LinearResult&)>& on_linear,
                              const ProcessGroup& group = {});

/// Throws Error(kCorrupt) where the outputs of a linear were not finite.
void check_outputs(const LinearReport& report, const std::string& linear);

/// Who of `processes` quantizes which linear: each in turn, the largest first, goes to the one with the least
/// to do.
std::vector<int> divide(const std::vector<LinearSpec>& linears, int processes);
/// Gives every process the quantized linears; owners[i] is the one that has linears[i]. Does not know of what
/// tuning changes.
void exchange(QuantizedBlock& quantized, const std::vector<LinearSpec>& linears,
              const std::vector<int>& owners, const ProcessGroup& group);

/// Puts a quantized block's weights, norms and biases into `block`.
void install(const QuantizedBlock& quantized, DecoderBlock& block, const ModelSpec& spec);
/// Puts those of `tensors` that belong to the norm called `name` there.
void install(const std::map<std::string, at::Tensor>& tensors, NormWeights& norm, const std::string& name);

}  // namespace stbllm
