#pragma once
// The steps of lean_weight.h as libtorch's operations on whole matrices. They run where the matrices are: a GPU has nothing else, and
// on the CPU they are the twins of the loops over lanes. Small things (scales, levels, the metric of a group) stay in host memory.

#include "stbllm/quantize/lean_weight.h"

namespace stbllm {

/// The search of best_codes() for all rows at once.
class TensorCodebook {
 public:
  TensorCodebook(const GroupCodebook& codebook, std::span<const float> level_values, int width, at::Device device);
  /// half_energy (states) as GroupTable has it, target (width, rows), scale (rows) -> symbols, int8 (width, rows).
  at::Tensor best(const at::Tensor& half_energy, const at::Tensor& target, const at::Tensor& scale) const;

 private:
  at::Tensor coefficients_;  // (states, width), zeros where pruned
  at::Tensor symbols_;       // int8, the same
};

/// Symbols as 0 or +- level value: float32 of the same shape, where `symbols` are.
at::Tensor unit_values(const at::Tensor& symbols, std::span<const float> level_values);

/// As their namesakes do, but for the order of sums: a code may differ where two are equally good to rounding. Codes must be
/// enumerable; `target`, `hessian`, `symbols` and `upper` are on one device.
namespace by_tensors {
void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate);
void refit(LeanWeight& lean, bool with_levels = true);
double descend(LeanWeight& lean);
}  // namespace by_tensors

}  // namespace stbllm
