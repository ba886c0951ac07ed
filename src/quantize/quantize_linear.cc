#include "stbllm/quantize/quantize_linear.h"

#include "methods.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"

namespace stbllm {

BinarizedWeight quantize_linear(const at::Tensor& weight, const InputStats& stats, const Method& method,
                                const LinearPlan& plan, LinearReport* report, LeanMetrics* metrics) {
  const double started = seconds_now();
  const at::Tensor w = weight.to(at::kCPU, at::kFloat);
  STBLLM_CHECK(stats.hessian.size(0) == w.size(1), "H has {} columns, the weight {}", stats.hessian.size(0),
               w.size(1));
  const at::Tensor weight_t = w.t().contiguous();
  LinearReport out;
  LeanMetrics own_metrics;
  const auto* lean = std::get_if<LeanMethod>(&method);
  const BinarizedWeight result =
      lean != nullptr
          ? quantize_lean(weight_t, stats, *lean, plan, out, metrics != nullptr ? *metrics : own_metrics)
          : quantize_by_regions(weight_t, stats, std::get<RegionMethod>(method), plan.scheme, out);
  if (report == nullptr) return result;
  {
    const int hessians = stats.holdout_hessian.defined() ? 2 : 1;
    const StageTimer timer("errors", 2 * hessians * OutputError::flops(w.size(0), w.size(1)));
    const at::Tensor dense = result.to_dense();
    out.output_error = OutputError(w, stats.hessian)(dense);
    if (stats.holdout_hessian.defined()) out.holdout_error = OutputError(w, stats.holdout_hessian)(dense);
  }
  out.seconds = seconds_now() - started;
  *report = std::move(out);
  return result;
}

}  // namespace stbllm
