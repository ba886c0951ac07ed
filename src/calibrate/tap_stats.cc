#include "stbllm/calibrate/tap_stats.h"

namespace stbllm {

TapStats::TapStats(const std::vector<LinearSpec>& linears, bool token_weights) {
  for (const LinearSpec& linear : linears)
    if (auto& accumulator = accumulators_[static_cast<size_t>(linear.tap)]; !accumulator)
      accumulator.emplace(linear.cols, token_weights);
}

void TapStats::add(Tap tap, const at::Tensor& inputs, bool held_out) {
  accumulators_[static_cast<size_t>(tap)]->add(inputs, held_out);
}

HiddenStream::Observer TapStats::observer() {
  return [this](Tap tap, const at::Tensor& inputs, bool held_out) { add(tap, inputs, held_out); };
}

std::array<InputStats, kTapCount> TapStats::finish(const ProcessGroup& group) {
  std::array<InputStats, kTapCount> stats;
  for (size_t tap = 0; tap < kTapCount; ++tap) {
    if (!accumulators_[tap]) continue;
    if (group.size() > 1) accumulators_[tap]->merge([&](at::Tensor& sum) { group.all_reduce(sum); });
    stats[tap] = accumulators_[tap]->finish();
    accumulators_[tap].reset();
  }
  return stats;
}

}  // namespace stbllm
