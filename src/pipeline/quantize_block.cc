#include "stbllm/pipeline/quantize_block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <optional>

#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/pipeline/spill.h"

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

/// Calls visit(first, count, held out) for windows that go through a block together; the last `holdout` go
/// apart.
void for_each_pass(const at::Tensor& hidden, int64_t holdout,
                   const std::function<void(int64_t, int64_t, bool)>& visit) {
  const int64_t windows = hidden.size(0), training = windows - holdout;
  const int64_t step = windows_per_pass(hidden.size(1));
  for (int64_t first = 0; first < training; first += step)
    visit(first, std::min(step, training - first), false);
  for (int64_t first = training; first < windows; first += step)
    visit(first, std::min(step, windows - first), true);
}

Positions positions_of(const ModelSpec& spec, const at::Tensor& hidden) {
  return {spec, 0, hidden.size(1), at::kFloat, hidden.device()};
}

TapObserver watching(const CalibrationObserver& observer, bool held_out) {
  if (!observer) return {};
  return [&observer, held_out](Tap tap, const at::Tensor& inputs) { observer(tap, inputs, held_out); };
}

void broadcast(BinarizedWeight& weight, LinearResult& result, const ProcessGroup& group, int root) {
  nlohmann::json facts;
  if (group.rank() == root)
    facts = {{"result", to_json(result, /*with_seconds=*/true)},
             {"column_block", weight.column_block},
             {"scale_bits", weight.scale_bits}};
  group.broadcast(facts, root);
  result = linear_result_from_json(facts.at("result"));
  weight.nm = result.code.nm;
  weight.levels = result.code.levels;
  weight.column_block = facts.at("column_block");
  weight.scale_bits = facts.at("scale_bits");
  for (at::Tensor BinarizedWeight::*tensor :
       {&BinarizedWeight::symbols, &BinarizedWeight::scales, &BinarizedWeight::scale_codes,
        &BinarizedWeight::row_scales, &BinarizedWeight::level_values, &BinarizedWeight::salient_columns,
        &BinarizedWeight::salient_signs, &BinarizedWeight::outlier_columns, &BinarizedWeight::outlier_values,
        &BinarizedWeight::unpackable})
    group.broadcast(weight.*tensor, root);
}

}  // namespace

std::vector<int> divide(const std::vector<LinearSpec>& linears, int processes) {
  std::vector<size_t> order(linears.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return linears[a].rows * linears[a].cols > linears[b].rows * linears[b].cols;
  });
  std::vector<int> owners(linears.size());
  std::vector<int64_t> load(processes);
  for (const size_t i : order) {
    const auto idlest = std::min_element(load.begin(), load.end());
    *idlest += linears[i].rows * linears[i].cols;
    owners[i] = static_cast<int>(idlest - load.begin());
  }
  return owners;
}

void check_outputs(const LinearReport& report, const std::string& linear) {
  if (!std::isfinite(report.output_error))
    fail(ErrorCode::kCorrupt,
         "linear {}: its outputs on the calibration text overflow float32; check the checkpoint's weights",
         linear);
}

TapStats::TapStats(const std::vector<LinearSpec>& linears, bool token_weights) {
  for (const LinearSpec& linear : linears)
    if (auto& accumulator = accumulators_[static_cast<size_t>(linear.tap)]; !accumulator)
      accumulator.emplace(linear.cols, token_weights);
}

std::array<InputStats, kTapCount> TapStats::finish(const ProcessGroup& group) {
  std::array<InputStats, kTapCount> stats;
  for (size_t tap = 0; tap < kTapCount; ++tap) {
    if (!accumulators_[tap]) continue;
    if (group.size() > 1) accumulators_[tap]->merge([&](at::Tensor& sum) { group.all_reduce(sum); });
    stats[tap] = accumulators_[tap]->finish();
    accumulators_[tap].reset();
  }
  return stats;
}

at::Tensor run_block(const DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden) {
  at::Tensor outputs = hidden.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  advance(block, spec, outputs);
  return outputs;
}

void observe_block(const DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden,
                   int64_t holdout, const CalibrationObserver& observer) {
  const Positions positions = positions_of(spec, hidden);
  for_each_pass(hidden, holdout, [&](int64_t first, int64_t count, bool held_out) {
    const at::Tensor pass = hidden.narrow(0, first, count);
    block.forward(pass.to(at::kFloat), positions, watching(observer, held_out));
    release_spilled(pass);
  });
}

void advance(const DecoderBlock& block, const ModelSpec& spec, at::Tensor& hidden,
             const CalibrationObserver& observer, int64_t holdout) {
  const Positions positions = positions_of(spec, hidden);
  for_each_pass(hidden, holdout, [&](int64_t first, int64_t count, bool held_out) {
    at::Tensor pass = hidden.narrow(0, first, count);
    pass.copy_(block.forward(pass.to(at::kFloat), positions, watching(observer, held_out)));
    release_spilled(pass);
  });
}

BlockResult compare_hidden(const at::Tensor& hidden, const at::Tensor& dense, const ProcessGroup& group) {
  double cosine = 0, error = 0;
  for (int64_t w = 0; w < hidden.size(0); ++w) {
    const at::Tensor own = hidden[w].to(at::kFloat), wanted = dense[w].to(at::kFloat);
    const at::Tensor norm_sq = wanted.square().sum(1).clamp_min(1e-30);  // (seqlen)
    const at::Tensor product = (own * wanted).sum(1), own_sq = own.square().sum(1).clamp_min(1e-30);
    cosine += (product / (norm_sq * own_sq).sqrt()).sum(0, false, at::kDouble).item<double>();
    error += ((own - wanted).square().sum(1) / norm_sq).sum(0, false, at::kDouble).item<double>();
    release_spilled(hidden[w]);
    release_spilled(dense[w]);
  }
  const double tokens = group.all_reduce(static_cast<double>(hidden.size(0) * hidden.size(1)));
  return {group.all_reduce(cosine) / tokens, group.all_reduce(error) / tokens, {}};
}

QuantizedBlock quantize_block(DecoderBlock& block, const ModelSpec& spec, const at::Tensor& hidden,
                              int64_t holdout, const Recipe& recipe, const Plan& plan,
                              const std::function<void(const LinearResult&)>& on_linear,
                              const ProcessGroup& group) {
  const std::vector<LinearSpec> linears = block.linears();
  std::array<InputStats, kTapCount> stats;
  {
    const StageTimer timer("statistics", statistics_flops(block, hidden.size(0) * hidden.size(1)));
    TapStats taps(linears, recipe.token_weights);
    observe_block(block, spec, hidden, holdout,
                  [&](Tap tap, const at::Tensor& inputs, bool held_out) { taps.add(tap, inputs, held_out); });
    stats = taps.finish(group);
  }

  const std::vector<int> owners = divide(linears, group.size());
  QuantizedBlock quantized;
  quantized.results.resize(linears.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    if (owners[i] != group.rank()) continue;
    const LinearSpec& linear = linears[i];
    const Recipe& own = plan.at(linear.name);
    LinearResult& result =
        quantized.results[i] = {linear.name, {own.nm, own.levels}, linear.rows, linear.cols, 0, {}};
    BinarizedWeight weight = quantize_linear(block.dense(linear.role).weight(),
                                             stats[static_cast<size_t>(linear.tap)], own, &result.report);
    check_outputs(result.report, linear.name);
    result.salient_share = weight.salient_share();
    const auto reads_the_same = [&](const LinearSpec& later) { return later.tap == linear.tap; };
    if (std::none_of(linears.begin() + static_cast<int64_t>(i) + 1, linears.end(), reads_the_same))
      stats[static_cast<size_t>(linear.tap)] = {};
    quantized.linears.emplace(linear.name, std::move(weight));
    on_linear(result);
  }
  stats = {};
  exchange(quantized, linears, owners, group);
  for (size_t i = 0; i < linears.size(); ++i)
    if (owners[i] != group.rank()) on_linear(quantized.results[i]);
  install(quantized, block, spec);
  return quantized;
}

void exchange(QuantizedBlock& quantized, const std::vector<LinearSpec>& linears,
              const std::vector<int>& owners, const ProcessGroup& group) {
  if (group.size() == 1) return;
  const StageTimer timer("exchange");
  quantized.results.resize(linears.size());
  for (size_t i = 0; i < linears.size(); ++i)
    broadcast(quantized.linears[linears[i].name], quantized.results[i], group, owners[i]);
}

void install(const QuantizedBlock& quantized, DecoderBlock& block, const ModelSpec& spec) {
  for (const LinearSpec& linear : block.linears()) {
    const auto& dense = block.dense(linear.role);
    const auto bias = quantized.tensors.find(linear.name + ".bias");
    block.set_linear(
        linear.role,
        std::make_unique<DenseLinear>(
            quantized.linears.at(linear.name).to_dense().to(dense.weight().device()),
            bias == quantized.tensors.end() ? dense.bias() : bias->second, dense.product_dtype()));
  }
  for (const NormSpec& norm : spec.norms(block.index()))
    install(quantized.tensors, block.norm(norm.role), norm.name);
}

void install(const std::map<std::string, at::Tensor>& tensors, NormWeights& norm, const std::string& name) {
  if (const auto weight = tensors.find(name + ".weight"); weight != tensors.end())
    norm.weight = weight->second;
  if (const auto bias = tensors.find(name + ".bias"); bias != tensors.end()) norm.bias = bias->second;
}

}  // namespace stbllm
