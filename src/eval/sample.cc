#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "stbllm/base/error.h"

namespace stbllm {

void check_sampling(double temperature, double top_p) {
  if (!(temperature >= 0)) fail(ErrorCode::kUsage, "temperature = {} must be at least 0", temperature);
  if (!(top_p > 0 && top_p <= 1)) fail(ErrorCode::kUsage, "top_p = {} must be above 0 and at most 1", top_p);
}

int32_t sample(std::span<const float> logits, double temperature, double top_p, SplitMix64& random) {
  const auto best = static_cast<int32_t>(std::ranges::max_element(logits) - logits.begin());
  const float highest = logits[static_cast<size_t>(best)];
  if (!std::isfinite(highest))
    fail(ErrorCode::kCorrupt, "the logits are not finite; the model's weights are damaged");
  if (temperature == 0) return best;

  std::vector<double> weight(logits.size());
  std::ranges::transform(logits, weight.begin(),
                         [&](float value) { return std::exp((double{value} - highest) / temperature); });
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  // All tokens below this weight together have less than 1 - top_p, so that the others reach top_p.
  const double least = (1 - top_p) * total / static_cast<double>(weight.size());
  std::vector<int32_t> order;
  for (size_t id = 0; id < weight.size(); ++id)
    if (weight[id] >= least) order.push_back(static_cast<int32_t>(id));
  if (top_p < 1)  // else the order does not matter
    std::ranges::stable_sort(order, std::greater(),
                             [&](int32_t id) { return weight[static_cast<size_t>(id)]; });

  double nucleus = 0;
  size_t kept = 0;
  while (kept < order.size() && nucleus < top_p * total)
    nucleus += weight[static_cast<size_t>(order[kept++])];
  double rest = random.uniform() * nucleus;
  for (size_t i = 0; i + 1 < kept; ++i) {
    rest -= weight[static_cast<size_t>(order[i])];
    if (rest < 0) return order[i];
  }
  return order[kept - 1];
}

}  // namespace stbllm
