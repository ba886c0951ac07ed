#pragma once
// The two methods behind quantize_linear().

#include <cmath>
#include <utility>

#include "stbllm/base/profile.h"
#include "stbllm/quantize/quantize_linear.h"

namespace stbllm {

/// weight_t: (cols, rows) float32 in host memory.
BinarizedWeight quantize_lean(const at::Tensor& weight_t, const InputStats& stats, const LeanMethod& method,
                              const LinearPlan& plan, LinearReport& report, LeanMetrics& metrics);
BinarizedWeight quantize_by_regions(const at::Tensor& weight_t, const InputStats& stats,
                                    const RegionMethod& method, const Scheme& scheme, LinearReport& report);

/// Columns of inputs that are always zero, in host memory.
inline at::Tensor dead_columns(const at::Tensor& hessian) {
  return hessian.diagonal().eq(0).nonzero().flatten().cpu();
}

inline at::Tensor round_to_half(const at::Tensor& x) { return x.to(at::kHalf).to(at::kFloat); }

/// `flops`: what the stage announces itself, without that of stages inside it; 0: no clear count.
template <typename Work>
auto timed(std::string_view stage, double flops, Work&& work) {
  const StageTimer timer(stage, flops);
  return work();
}

}  // namespace stbllm
