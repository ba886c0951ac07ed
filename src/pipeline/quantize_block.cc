#include "stbllm/pipeline/quantize_block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <optional>

#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"

namespace stbllm {
namespace {

/// Tokens that go through a block in one call: enough for full-speed products, few enough for small intermediates.
constexpr int64_t kTokensPerPass = 2048;

/// The forward pass through the linears, and one x x^T per tap.
double statistics_flops(const DecoderBlock& block, int64_t tokens) {
  double flops = 0;
  std::array<double, kTapCount> tap_cols{};
  for (const LinearSpec& linear : block.linears()) {
    flops += 2.0 * static_cast<double>(linear.rows * linear.cols);
    tap_cols[static_cast<size_t>(linear.tap)] = static_cast<double>(linear.cols);
  }
  for (const double cols : tap_cols) flops += 2 * cols * cols;
  return flops * static_cast<double>(tokens);
}

}  // namespace

at::Tensor run_block(const DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden, int64_t first_held_out,
                     const CalibrationObserver& observer) {
  const int64_t windows = hidden.size(0), seqlen = hidden.size(1);
  const Positions positions(spec, 0, seqlen, at::kFloat, at::kCPU);
  const int64_t step = std::max<int64_t>(1, kTokensPerPass / seqlen);
  at::Tensor outputs = at::empty_like(hidden);
  for (int64_t first = 0; first < windows;) {
    int64_t count = std::min(step, windows - first);
    const bool holdout = first_held_out >= 0 && first >= first_held_out;
    if (first_held_out > first) count = std::min(count, first_held_out - first);  // a pass is held out as a whole or not at all
    TapObserver tap;
    if (observer) tap = [&](Tap which, const at::Tensor& inputs) { observer(which, inputs, holdout); };
    outputs.narrow(0, first, count).copy_(block.forward(hidden.narrow(0, first, count).to(at::kFloat), positions, tap));
    first += count;
  }
  return outputs;
}

QuantizedBlock quantize_block(DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden, int64_t holdout,
                              const Recipe& recipe, const std::function<NmPattern(const LinearSpec&)>& pattern,
                              const std::function<void(const LinearResult&)>& on_linear) {
  std::array<std::optional<StatsAccumulator>, kTapCount> accumulators;
  std::array<std::optional<InputStats>, kTapCount> stats;
  {
    const StageTimer timer("statistics", statistics_flops(block, hidden.size(0) * hidden.size(1)));
    for (const LinearSpec& linear : block.linears()) {
      auto& accumulator = accumulators[static_cast<size_t>(linear.tap)];
      if (!accumulator) accumulator.emplace(linear.cols, recipe.token_weights);
    }
    run_block(block, spec, hidden, hidden.size(0) - holdout, [&](Tap tap, const at::Tensor& inputs, bool held_out) {
      accumulators[static_cast<size_t>(tap)]->add(inputs, held_out);
    });
    for (size_t tap = 0; tap < kTapCount; ++tap)
      if (accumulators[tap]) {
        stats[tap] = accumulators[tap]->finish();
        accumulators[tap].reset();
      }
  }

  QuantizedBlock quantized;
  for (const LinearSpec& linear : block.linears()) {
    const auto& dense = dynamic_cast<const DenseLinear&>(block.linear(linear.role));
    Recipe own = recipe;
    own.nm = pattern(linear);
    LinearResult result{linear.name, own.nm, linear.rows, linear.cols, 0, {}};
    BinarizedWeight weight = quantize_linear(dense.weight(), *stats[static_cast<size_t>(linear.tap)], own, &result.report);
    result.salient_share = weight.salient_share();
    block.set_linear(linear.role, std::make_unique<DenseLinear>(weight.to_dense(), dense.bias(), dense.product_dtype()));
    quantized.linears.emplace(linear.name, std::move(weight));
    quantized.results.push_back(result);
    on_linear(result);
  }
  return quantized;
}

void install(const QuantizedBlock& quantized, DecoderBlock& block, const ModelSpec& spec) {
  for (const LinearSpec& linear : block.linears()) {
    const auto& dense = dynamic_cast<const DenseLinear&>(block.linear(linear.role));
    const auto bias = quantized.tensors.find(linear.name + ".bias");
    block.set_linear(linear.role, std::make_unique<DenseLinear>(quantized.linears.at(linear.name).to_dense(),
                                                               bias == quantized.tensors.end() ? dense.bias() : bias->second,
                                                               dense.product_dtype()));
  }
  install(quantized.tensors, block.attn_norm(), spec.attn_norm(block.index()));
  install(quantized.tensors, block.mlp_norm(), spec.mlp_norm(block.index()));
}

void install(const std::map<std::string, at::Tensor>& tensors, NormWeights& norm, const std::string& name) {
  if (const auto weight = tensors.find(name + ".weight"); weight != tensors.end()) norm.weight = weight->second;
  if (const auto bias = tensors.find(name + ".bias"); bias != tensors.end()) norm.bias = bias->second;
}

}  // namespace stbllm
