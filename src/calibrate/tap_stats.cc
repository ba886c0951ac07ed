#include "stbllm/calibrate/tap_stats.h"

namespace stbllm {

TapStats::TapStats(const std::vector<LinearSpec>& linears, const StatsOptions& options) {
  for (const LinearSpec& linear : linears)
    if (auto& accumulator = accumulators_[static_cast<size_t>(linear.tap)]; !accumulator)
      accumulator.emplace(linear.cols, options);
}

void TapStats::add(Tap tap, const at::Tensor& inputs, bool held_out, const Drift& drift) {
  accumulators_[static_cast<size_t>(tap)]->add(inputs, held_out, drift);
}

HiddenStream::Observer TapStats::observer() {
  return [this](Tap tap, const at::Tensor& inputs, bool held_out) { add(tap, inputs, held_out); };
}

std::array<InputStats, kTapCount> TapStats::finish(const ProcessGroup& group) {
  std::array<InputStats, kTapCount> stats;
  for (const Tap tap : kTaps)
    if (accumulators_[static_cast<size_t>(tap)]) stats[static_cast<size_t>(tap)] = finish(tap, group);
  return stats;
}

InputStats TapStats::finish(Tap tap, const ProcessGroup& group) {
  std::optional<StatsAccumulator>& accumulator = accumulators_[static_cast<size_t>(tap)];
  if (group.size() > 1) accumulator->merge([&](at::Tensor& sum) { group.all_reduce(sum); });
  const InputStats stats = accumulator->finish();
  accumulator.reset();
  return stats;
}

}  // namespace stbllm
