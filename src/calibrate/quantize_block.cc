#include "stbllm/calibrate/quantize_block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"
#include "stbllm/calibrate/tap_stats.h"

namespace stbllm {
namespace {

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

std::array<InputStats, kTapCount> observe(const DecoderBlock& block, const HiddenStream& stream,
                                          bool token_weights, const ProcessGroup& group) {
  const StageTimer timer("statistics", statistics_flops(block, stream.tokens()));
  TapStats taps(block.linears(), token_weights);
  stream.observe(block, taps.observer());
  return taps.finish(group);
}

/// Whether a linear behind the first `done` + 1 reads what linears[done] reads.
bool read_again(const std::vector<LinearSpec>& linears, size_t done) {
  return std::any_of(linears.begin() + static_cast<int64_t>(done) + 1, linears.end(),
                     [&](const LinearSpec& later) { return later.tap == linears[done].tap; });
}

}  // namespace

void check_outputs(const LinearReport& report, const std::string& linear) {
  if (!std::isfinite(report.output_error))
    fail(ErrorCode::kCorrupt,
         "linear {}: its outputs on the calibration text overflow float32; check the checkpoint's weights",
         linear);
}

QuantizedBlock quantize_block(DecoderBlock& block, const ModelSpec& spec, const HiddenStream& stream,
                              const Method& method, const Plan& plan,
                              const std::function<void(const LinearResult&)>& on_linear,
                              const ProcessGroup& group) {
  const std::vector<LinearSpec> linears = block.linears();
  std::array<InputStats, kTapCount> stats = observe(block, stream, token_weights(method), group);
  std::array<LeanMetrics, kTapCount> metrics;
  const std::vector<int> owners = divide(linears, group.size());
  QuantizedBlock quantized;
  quantized.results.resize(linears.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    if (owners[i] != group.rank()) continue;
    const LinearSpec& linear = linears[i];
    const LinearPlan& own = plan.at(linear.name);
    const auto tap = static_cast<size_t>(linear.tap);
    LinearResult& result = quantized.results[i] = {.name = linear.name,
                                                   .scheme = own.scheme,
                                                   .rows = linear.rows,
                                                   .cols = linear.cols,
                                                   .salient_share = 0,
                                                   .report = {}};
    const auto& dense = block.dense(linear.role);
    BinarizedWeight weight =
        quantize_linear(dense.weight(), stats[tap], method, own, &result.report, &metrics[tap]);
    check_outputs(result.report, linear.name);
    result.salient_share = weight.salient_share();
    if (!read_again(linears, i)) {
      stats[tap] = {};
      metrics[tap] = {};
    }
    quantized.linears.emplace(linear.name, std::move(weight));
    on_linear(result);
  }
  stats = {};
  metrics = {};
  exchange(quantized, linears, owners, group);
  for (size_t i = 0; i < linears.size(); ++i)
    if (owners[i] != group.rank()) on_linear(quantized.results[i]);
  install(quantized, block, spec);
  return quantized;
}

}  // namespace stbllm
