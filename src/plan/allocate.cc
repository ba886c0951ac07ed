#include "stbllm/plan/allocate.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "stbllm/base/error.h"

namespace stbllm {

std::vector<NmPattern> allocate_by_norm(NmPattern target, const std::vector<double>& weight_norms) {
  const double total = std::accumulate(weight_norms.begin(), weight_norms.end(), 0.0);
  std::vector<NmPattern> result;
  for (const double norm : weight_norms) {
    const double share = total > 0 ? norm / total : 0;
    const double ratio = share + (1 - share) * target.density();
    const int keep = std::clamp(static_cast<int>(std::lround(ratio * target.group)), 1, target.group);
    result.push_back({keep, target.group});
  }
  return result;
}

std::vector<NmPattern> allocate_by_outliers(NmPattern target, const std::vector<double>& outlier_shares) {
  STBLLM_CHECK(!outlier_shares.empty(), "no blocks");
  const auto [low, high] = std::minmax_element(outlier_shares.begin(), outlier_shares.end());
  std::vector<double> z;
  for (const double share : outlier_shares) z.push_back(*high > *low ? 2 * (share - *low) / (*high - *low) : 0);
  const double mean = std::accumulate(z.begin(), z.end(), 0.0) / static_cast<double>(z.size());
  std::vector<NmPattern> result;
  for (const double value : z) {
    int shift = static_cast<int>(std::nearbyint(value - mean));  // half to even in the default rounding mode
    if (shift == 1) shift = 2;
    result.push_back({std::clamp(target.keep + shift, 1, target.group), target.group});
  }
  return result;
}

double mean_density(const std::vector<NmPattern>& patterns) {
  double sum = 0;
  for (const NmPattern& nm : patterns) sum += nm.density();
  return sum / static_cast<double>(patterns.size());
}

std::string describe(const std::vector<NmPattern>& patterns) {
  std::map<NmPattern, int> counts;
  for (const NmPattern& nm : patterns) ++counts[nm];
  if (counts.size() == 1) return counts.begin()->first.str();
  std::string text;
  for (const auto& [nm, count] : counts) text += (text.empty() ? "" : ", ") + nm.str() + " x " + std::to_string(count);
  return text;
}

}  // namespace stbllm
