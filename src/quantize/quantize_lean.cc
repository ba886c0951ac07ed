// The lean method: every code chosen by exhaustive search in the metric of H, scales fitted afterwards.

#include "methods.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/quantize/lean_weight.h"

namespace stbllm {
namespace {

/// A sweep that changes fewer symbols than this share is the last: the next would change next to nothing.
constexpr double kSettledShare = 1e-4;

/// Operations of one search over all groups of the weight: per state a dot product of N terms and four for
/// its cost.
double search_flops(const LeanWeight& lean, int levels) {
  if (!GroupCodebook::enumerable(lean.nm, levels)) return 0;
  const int64_t states = GroupCodebook(lean.nm, levels, lean.nm.group).states();
  const double groups = static_cast<double>(lean.rows() * lean.cols()) / lean.nm.group;
  return groups * static_cast<double>(states) * (2 * lean.nm.keep + 3);
}

/// The limit on outlier columns is the smaller of the method's and the plan's.
LeanMetricOptions metric_options(const InputStats& stats, const LeanMethod& method, const LinearPlan& plan) {
  LeanMetricOptions options{
      .outliers = method.outliers, .shrink = method.shrink, .damping = {}, .target_damping = {}};
  if (options.outliers && plan.outlier_limit)
    options.outliers->limit = std::min(options.outliers->limit, *plan.outlier_limit);
  if (method.compensate != Compensate::kNone) options.damping = method.damping;
  if (stats.input_drift.defined()) options.target_damping = method.damping;
  return options;
}

/// The steps of the method. Works where the metric is, if all states of a group can be tried there.
LeanWeight optimize(const at::Tensor& weight_t, const LeanMetric& metric, const LeanMethod& method,
                    const Scheme& scheme) {
  const int levels = scheme.levels;
  LeanWeight lean;
  lean.nm = scheme.nm;
  lean.column_block = method.column_block;
  lean.scale_bits = method.scale_bits;
  lean.target = weight_t.clone();
  const at::Device device =
      GroupCodebook::enumerable(lean.nm, levels) ? metric.hessian.device() : at::Device(at::kCPU);
  lean.hessian = metric.hessian.to(device);
  const at::Tensor upper = metric.factor ? metric.factor->upper.to(device) : at::Tensor();
  lean.target.index_fill_(0, dead_columns(lean.hessian), 0);  // outlier columns among them
  const double one_search = search_flops(lean, levels);
  timed("encode", kEncodeSearches * one_search, [&] {
    initialize_scales(lean, levels, lean.hessian.diagonal().cpu().contiguous());
    lean.target = lean.target.to(device);
    lean.symbols = lean.symbols.to(device);
    encode_columns(lean, upper, method.compensate);
  });
  if (method.refit > 0) timed("refit", 0, [&] { refit(lean); });
  for (int sweep = 0; sweep < method.descend; ++sweep) {
    check_interrupt();
    const double changed = timed("descend", one_search, [&] { return descend(lean); });
    // After the first sweep levels hardly move.
    if (sweep < method.refit) timed("refit", 0, [&] { refit(lean, /*with_levels=*/sweep == 0); });
    if (changed < kSettledShare) break;
  }
  return lean;
}

BinarizedWeight finish(const LeanWeight& lean) {
  BinarizedWeight result;
  result.nm = lean.nm;
  result.levels = static_cast<int>(lean.level_values.size());
  result.column_block = lean.column_block;
  result.scale_bits = lean.scale_bits;
  result.symbols = lean.symbols.t().contiguous().cpu();
  if (lean.scale_bits == 16) {
    result.scales = lean.scales.t().contiguous().unsqueeze(2);
  } else {
    result.scale_codes = lean.scale_codes.t().contiguous();
    result.row_scales = lean.row_scales;
    result.level_values = at::tensor(lean.level_values, at::kFloat);
    result.expand_scales();
  }
  return result;
}

/// W* = W + (a W C + b R) H^-1 with the H of the metric, outlier columns included, in host memory. Everything
/// is transposed.
///
/// The shares a and b are fixed. The a that is best for a linear by itself, on held-out windows, is 0.9 in
/// the median of SmolLM2-135M, but what all linears overfit adds up: with 7168 tokens it gave 309 where 0.75
/// gave 235 and 0.5 gave 207 (perplexity on Wikitext-2 by `stbllm`, b = 0).
at::Tensor asymmetric_target(const at::Tensor& weight_t, const InputStats& stats, const LeanMetric& metric,
                             const LeanMethod& method) {
  if (!metric.target_factor) return weight_t;
  const StageTimer timer("target");
  const at::Tensor& upper = metric.target_factor->upper;  // H^-1 = U^T U
  at::Tensor gradient = stats.input_drift.t().mm(weight_t.to(upper.device())).mul_(method.asymmetry);
  if (stats.hidden_drift.defined()) gradient.add_(stats.hidden_drift.t(), method.residual);
  const at::Tensor target = weight_t + upper.t().mm(upper.mm(gradient)).cpu();
  // Inputs that are all but zero ask for weights that no fp16 scale holds; then there is nothing to make up
  // for.
  constexpr float kLargestWeight = 1024;
  return target.abs().max().item<float>() < kLargestWeight ? target : weight_t;
}

/// Stores the columns of the original weights beside the codes.
void store_outliers(BinarizedWeight& result, const at::Tensor& weight_t,
                    const std::vector<int64_t>& outliers) {
  if (outliers.empty()) return;
  const at::Tensor columns = at::tensor(outliers, at::kLong);
  result.outlier_columns = columns.to(at::kInt);
  result.outlier_values = round_to_half(weight_t.index_select(0, columns));
  // The codes at these columns do not count; one fixed symbol keeps the bytes canonical.
  const at::Tensor symbols = result.symbols.index_select(1, columns);
  result.symbols.index_copy_(1, columns, symbols.ne(0).to(at::kChar));
}

}  // namespace

BinarizedWeight quantize_lean(const at::Tensor& weight_t, const InputStats& stats, const LeanMethod& method,
                              const LinearPlan& plan, LinearReport& report, LeanMetrics& metrics) {
  const LeanMetric& metric = metrics.get(stats, metric_options(stats, method, plan));
  const at::Tensor target = asymmetric_target(weight_t, stats, metric, method);
  BinarizedWeight result = finish(optimize(target, metric, method, plan.scheme));
  store_outliers(result, target, metric.outliers);
  report.shrink = method.shrink;
  if (metric.factor) {
    report.damping = metric.factor->damping;
    report.damping_retries = metric.factor->retries;
  }
  return result;
}

}  // namespace stbllm
