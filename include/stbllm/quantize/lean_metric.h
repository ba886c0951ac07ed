#pragma once
// The metric in which the codes of a lean linear are chosen: H of its inputs, shrunk and without the outlier
// columns, and its triangular factor.

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "stbllm/quantize/compensate.h"
#include "stbllm/quantize/input_stats.h"
#include "stbllm/quantize/method.h"

namespace stbllm {

/// What decides a metric beside the statistics.
struct LeanMetricOptions {
  std::optional<OutlierColumns> outliers;
  double shrink = 0;
  std::optional<double> damping;         ///< of `factor`; unset: it is not made
  std::optional<double> target_damping;  ///< of `target_factor`; unset: it is not made

  bool operator==(const LeanMetricOptions&) const = default;
};

struct LeanMetric {
  std::vector<int64_t> outliers;               ///< columns to be stored exactly, ascending
  at::Tensor hessian;                          ///< (cols, cols), on the device of the statistics
  std::optional<InverseFactor> factor;         ///< of `hessian`
  std::optional<InverseFactor> target_factor;  ///< of the same H with the outlier columns in it
};

/// The metrics of one tap. The last one is kept, since the next linear of the tap mostly wants the same.
class LeanMetrics {
 public:
  const LeanMetric& get(const InputStats& stats, const LeanMetricOptions& options);

 private:
  std::optional<LeanMetricOptions> options_;  // of metric_
  LeanMetric metric_;
};

}  // namespace stbllm
