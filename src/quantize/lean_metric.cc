#include "stbllm/quantize/lean_metric.h"

#include <algorithm>

namespace stbllm {
namespace {

/// Columns that carry at least `share` of trace(H), the largest first `limit` of them, ascending.
std::vector<int64_t> find_outliers(const at::Tensor& hessian, const std::optional<OutlierColumns>& rule) {
  std::vector<int64_t> columns;
  if (!rule || rule->limit <= 0) return columns;
  const at::Tensor diagonal = hessian.diagonal().cpu().contiguous();
  const float* energy = diagonal.data_ptr<float>();
  const double threshold = rule->share * diagonal.sum(at::kDouble).item<double>();
  for (int64_t j = 0; j < diagonal.numel(); ++j)
    if (energy[j] > 0 && energy[j] >= threshold) columns.push_back(j);
  std::stable_sort(columns.begin(), columns.end(),
                   [&](int64_t a, int64_t b) { return energy[a] > energy[b]; });
  if (std::ssize(columns) > rule->limit) columns.resize(rule->limit);
  std::sort(columns.begin(), columns.end());
  return columns;
}

}  // namespace

const LeanMetric& LeanMetrics::get(const InputStats& stats, const LeanMetricOptions& options) {
  if (options_ == options) return metric_;
  options_.reset();
  metric_ = {};  // There are never two of them in memory.
  metric_.outliers = find_outliers(stats.hessian, options.outliers);
  metric_.hessian = shrink_hessian(stats.hessian, options.shrink);
  if (options.target_damping && (!metric_.outliers.empty() || options.target_damping != options.damping))
    metric_.target_factor = inverse_factor(metric_.hessian, *options.target_damping);
  if (!metric_.outliers.empty()) {
    const at::Tensor columns = at::tensor(metric_.outliers, at::kLong).to(metric_.hessian.device());
    metric_.hessian.index_fill_(0, columns, 0);
    metric_.hessian.index_fill_(1, columns, 0);
  }
  if (options.damping) metric_.factor = inverse_factor(metric_.hessian, *options.damping);
  if (options.target_damping && !metric_.target_factor) metric_.target_factor = metric_.factor;
  options_ = options;
  return metric_;
}

}  // namespace stbllm
