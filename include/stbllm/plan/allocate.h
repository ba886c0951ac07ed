#pragma once
// How many weights each decoder block keeps: a pure function from one number per block to one N per block.

#include <string>
#include <vector>

#include "stbllm/base/nm_pattern.h"

namespace stbllm {

/// `norm` (STBLLM eq. for layer-wise N:M): ratio_i = a_i + (1 - a_i) R with a_i = w_i / sum w, R = N/M, rounded to N of M.
/// weight_norms: L2 norm of all weights of each block.
std::vector<NmPattern> allocate_by_norm(NmPattern target, const std::vector<double>& weight_norms);

/// `outlier` (released STBLLM code): z = 2 (o - min) / (max - min), minus its mean, rounded half to even, 1 -> 2; the number of
/// weights *pruned* per group is M - N - z_i. outlier_shares: percent of scores |W_ij| S_j above 6x the block's mean score.
std::vector<NmPattern> allocate_by_outliers(NmPattern target, const std::vector<double>& outlier_shares);

/// Mean N/M over blocks of equal size.
double mean_density(const std::vector<NmPattern>& patterns);

/// "4:8" when all are equal, else "4:8 x 20, 6:8 x 10".
std::string describe(const std::vector<NmPattern>& patterns);

}  // namespace stbllm
