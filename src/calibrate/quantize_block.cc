#include "stbllm/calibrate/quantize_block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"
#include "stbllm/calibrate/tap_stats.h"

namespace stbllm {
namespace {

/// Operations of the linears of a block.
double linear_flops(const DecoderBlock& block, int64_t tokens) {
  double flops = 0;
  for (const LinearSpec& linear : block.linears())
    flops += 2.0 * static_cast<double>(linear.rows * linear.cols);
  return flops * static_cast<double>(tokens);
}

/// The forward pass through the linears, and one x x^T per tap.
double statistics_flops(const DecoderBlock& block, int64_t tokens) {
  std::array<double, kTapCount> tap_cols{};
  for (const LinearSpec& linear : block.linears())
    tap_cols[static_cast<size_t>(linear.tap)] = static_cast<double>(linear.cols);
  double flops = 0;
  for (const double cols : tap_cols) flops += 2 * cols * cols;
  return flops * static_cast<double>(tokens) + linear_flops(block, tokens);
}

/// Whether a linear behind the first `done` + 1 reads what linears[done] reads.
bool read_again(const std::vector<LinearSpec>& linears, size_t done) {
  return std::any_of(linears.begin() + static_cast<int64_t>(done) + 1, linears.end(),
                     [&](const LinearSpec& later) { return later.tap == linears[done].tap; });
}

/// Takes a stream through a whole block, tap by tap or at once.
void pass(HiddenStream& stream, const DecoderBlock& block, bool tap_by_tap) {
  if (!tap_by_tap) return stream.advance(block);
  for (int tap = 0; tap < kTapCount; ++tap) stream.advance_to_next_tap(block);
  stream.finish_block(block);
}

class BlockQuantizer {
 public:
  BlockQuantizer(DecoderBlock& block, const BlockStreams& streams, const Method& method, const Plan& plan,
                 const std::function<void(const LinearResult&)>& on_linear, const ProcessGroup& group)
      : block_(block),
        streams_(streams),
        method_(method),
        plan_(plan),
        on_linear_(on_linear),
        group_(group),
        linears_(planned(block.linears(), plan)),
        taps_(block.linears(), stats_options(method)) {}

  QuantizedBlock run() {
    if (is_sequential(method_))
      run_tap_by_tap();
    else
      run_at_once();
    return std::move(quantized_);
  }

 private:
  using Stats = std::array<InputStats, kTapCount>;  // by tap; empty where no linear reads it any more

  void run_at_once() {
    Stats stats;
    {
      const StageTimer timer("statistics", statistics_flops(block_, streams_.quantized.tokens()));
      streams_.quantized.observe(block_, taps_.observer());
      stats = taps_.finish(group_);
    }
    quantize(linears_, stats);
    for (const LinearSpec& linear : linears_)
      install(quantized_.linears.at(linear.name), block_, linear.role);
    pass_block(block_, streams_, method_);
  }

  void run_tap_by_tap() {
    const bool asymmetric = is_asymmetric(method_);
    for (const Tap tap : kTaps) {
      Stats stats;
      {
        const StageTimer timer("statistics",
                               statistics_flops(block_, streams_.quantized.tokens()) / kTapCount);
        if (asymmetric) streams_.dense->advance_to_next_tap(*streams_.dense_block);
        streams_.quantized.advance_to_next_tap(
            block_, [&](int64_t first, const at::Tensor& x, bool held_out) {
              taps_.add(tap, x, held_out, asymmetric && !held_out ? drift_at(tap, first, x) : Drift{});
            });
        stats[static_cast<size_t>(tap)] = taps_.finish(tap, group_);
      }
      std::vector<LinearSpec> linears;
      std::ranges::copy_if(linears_, std::back_inserter(linears),
                           [&](const auto& l) { return l.tap == tap; });
      quantize(linears, stats);
      for (const LinearSpec& linear : linears)
        install(quantized_.linears.at(linear.name), block_, linear.role);
    }
    const StageTimer timer("outputs", linear_flops(block_, streams_.quantized.tokens()) / kTapCount);
    streams_.quantized.finish_block(block_);
    if (asymmetric)
      streams_.dense->finish_block(*streams_.dense_block);
    else if (streams_.dense != nullptr)
      streams_.dense->advance(*streams_.dense_block);
  }

  /// How far the quantized stream is from the dense one where both stand, of windows from `first` on with
  /// inputs x.
  Drift drift_at(Tap tap, int64_t first, const at::Tensor& x) const {
    const int64_t count = x.size(0);
    Drift drift{.inputs = streams_.dense->read_inputs(first, count) - x, .hidden = {}};
    if (adds_to_hidden(tap))
      drift.hidden = streams_.dense->read_hidden(first, count) - streams_.quantized.read_hidden(first, count);
    return drift;
  }

  /// Quantizes some linears, of which every process ends with all; `stats` are used up.
  void quantize(const std::vector<LinearSpec>& linears, Stats& stats) {
    std::array<LeanMetrics, kTapCount> metrics;
    const std::vector<int> owners = divide(linears, group_.size());
    std::vector<LinearResult> results(linears.size());
    for (size_t i = 0; i < linears.size(); ++i) {
      const LinearSpec& linear = linears[i];
      const auto tap = static_cast<size_t>(linear.tap);
      if (owners[i] == group_.rank()) {
        const LinearPlan& own = plan_.at(linear.name);
        LinearResult& result = results[i] = {.name = linear.name,
                                             .scheme = own.scheme,
                                             .rows = linear.rows,
                                             .cols = linear.cols,
                                             .salient_share = 0,
                                             .report = {}};
        BinarizedWeight weight = quantize_linear(block_.dense(linear.role).weight(), stats[tap], method_, own,
                                                 &result.report, &metrics[tap]);
        check_outputs(result.report.output_error, linear.name);
        result.salient_share = weight.salient_share();
        quantized_.linears.emplace(linear.name, std::move(weight));
        on_linear_(result);
      }
      if (!read_again(linears, i)) {
        stats[tap] = {};
        metrics[tap] = {};
      }
    }
    exchange(quantized_.linears, results, linears, owners, group_);
    for (size_t i = 0; i < linears.size(); ++i)
      if (owners[i] != group_.rank()) on_linear_(results[i]);
    std::ranges::move(results, std::back_inserter(quantized_.results));
  }

  DecoderBlock& block_;
  const BlockStreams& streams_;
  const Method& method_;
  const Plan& plan_;
  const std::function<void(const LinearResult&)>& on_linear_;
  const ProcessGroup& group_;
  const std::vector<LinearSpec> linears_;
  TapStats taps_;
  QuantizedBlock quantized_;
};

}  // namespace

std::vector<LinearSpec> planned(const std::vector<LinearSpec>& linears, const Plan& plan) {
  std::vector<LinearSpec> result;
  std::ranges::copy_if(linears, std::back_inserter(result),
                       [&](const LinearSpec& linear) { return plan.contains(linear.name); });
  return result;
}

void check_outputs(double output_error, const std::string& linear) {
  if (!std::isfinite(output_error))
    fail(ErrorCode::kCorrupt,
         "linear {}: its outputs on the calibration text overflow float32; check the checkpoint's weights",
         linear);
}

QuantizedBlock quantize_block(DecoderBlock& block, const BlockStreams& streams, const Method& method,
                              const Plan& plan, const std::function<void(const LinearResult&)>& on_linear,
                              const ProcessGroup& group) {
  return BlockQuantizer(block, streams, method, plan, on_linear, group).run();
}

void pass_block(const DecoderBlock& block, const BlockStreams& streams, const Method& method) {
  const StageTimer timer("outputs", linear_flops(block, streams.quantized.tokens()));
  pass(streams.quantized, block, is_sequential(method));
  if (streams.dense != nullptr) pass(*streams.dense, *streams.dense_block, is_asymmetric(method));
}

}  // namespace stbllm
