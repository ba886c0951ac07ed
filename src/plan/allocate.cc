#include "stbllm/plan/allocate.h"

#include <algorithm>
#include <cmath>
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
  for (const double share : outlier_shares)
    z.push_back(*high > *low ? 2 * (share - *low) / (*high - *low) : 0);
  const double mean = std::accumulate(z.begin(), z.end(), 0.0) / static_cast<double>(z.size());
  std::vector<NmPattern> result;
  for (const double value : z) {
    int shift = static_cast<int>(std::nearbyint(value - mean));  // half to even in the default rounding mode
    if (shift == 1) shift = 2;
    result.push_back({std::clamp(target.keep + shift, 1, target.group), target.group});
  }
  return result;
}

void check_affordable(int64_t least, int64_t budget) {
  if (least > budget)
    fail(ErrorCode::kUsage,
         "the target allows {} bytes for the linears, and the smallest schemes take {}; raise it by a factor "
         "of at least {:.3f}",
         budget, least, std::ceil(1000 * static_cast<double>(least) / static_cast<double>(budget)) / 1000);
}

std::vector<size_t> allocate_by_budget(const std::vector<std::vector<Offer>>& offers, int64_t budget) {
  struct Step {
    size_t linear, offer;
    int64_t bytes;
    double saved_per_byte;
  };
  std::vector<Step> steps;
  std::vector<size_t> choice(offers.size());
  int64_t total = 0;
  for (size_t i = 0; i < offers.size(); ++i) {
    const std::vector<Offer>& own = offers[i];
    STBLLM_CHECK(!own.empty(), "no offers for linear {}", i);
    for (size_t o = 1; o < own.size(); ++o)
      if (std::pair(own[o].bytes, own[o].error) < std::pair(own[choice[i]].bytes, own[choice[i]].error))
        choice[i] = o;
    total += own[choice[i]].bytes;
    for (size_t from = choice[i];;) {
      Step best{i, from, 0, 0};
      for (size_t to = 0; to < own.size(); ++to) {
        const int64_t bytes = own[to].bytes - own[from].bytes;
        const double saved = bytes > 0 ? (own[from].error - own[to].error) / static_cast<double>(bytes) : 0;
        if (saved > best.saved_per_byte) best = {i, to, bytes, saved};
      }
      if (best.offer == from) break;
      steps.push_back(best);
      from = best.offer;
    }
  }
  check_affordable(total, budget);
  // The steps of a linear come with falling gain, so that a stable sort keeps their order.
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.saved_per_byte > b.saved_per_byte; });
  std::vector<bool> closed(offers.size());
  for (const Step& step : steps) {
    if (closed[step.linear] || (closed[step.linear] = total + step.bytes > budget)) continue;
    choice[step.linear] = step.offer;
    total += step.bytes;
  }
  return choice;
}

}  // namespace stbllm
