#pragma once
// Which scheme each linear gets: pure functions from a few numbers per block or linear.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stbllm/base/nm_pattern.h"

namespace stbllm {

/// `norm` (STBLLM eq. for layer-wise N:M): ratio_i = a_i + (1 - a_i) R with a_i = w_i / sum w, R = N/M,
/// rounded to N of M. weight_norms: L2 norm of all weights of each block.
std::vector<NmPattern> allocate_by_norm(NmPattern target, const std::vector<double>& weight_norms);

/// `outlier` (released STBLLM code): z = 2 (o - min) / (max - min), minus its mean, rounded half to even, 1
/// -> 2; the number of weights *pruned* per group is M - N - z_i. outlier_shares: percent of scores |W_ij|
/// S_j above 6x the block's mean score.
std::vector<NmPattern> allocate_by_outliers(NmPattern target, const std::vector<double>& outlier_shares);

/// What a linear would take and do with one of the schemes.
struct Offer {
  int64_t bytes = 0;
  double error = 0;  ///< comparable between linears
};

/// Throws Error(kUsage) where `least` bytes, those of the smallest schemes, are more than `budget`.
void check_affordable(int64_t least, int64_t budget);

/// `budget`: one of offers[i] for each linear i, such that the errors add up to little and the bytes to no
/// more than `budget`. Goes along the lower convex hulls of (bytes, error) from the smallest offers, always
/// the step that saves the most error per byte and still fits: at every budget that is the end of a step the
/// best choice there is. Throws as check_affordable() does.
std::vector<size_t> allocate_by_budget(const std::vector<std::vector<Offer>>& offers, int64_t budget);

}  // namespace stbllm
