#pragma once
// Statistics of the inputs of all linears of one decoder block.

#include <array>
#include <optional>
#include <vector>

#include "stbllm/model/hidden_stream.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/quantize/input_stats.h"

namespace stbllm {

class TapStats {
 public:
  TapStats(const std::vector<LinearSpec>& linears, const StatsOptions& options);
  /// Adds what a tap has seen: inputs (windows, seqlen, cols of the tap), the rest as in
  /// StatsAccumulator::add().
  void add(Tap tap, const at::Tensor& inputs, bool held_out, const Drift& drift = {});
  /// The same as what a HiddenStream calls.
  HiddenStream::Observer observer();
  /// Summed up over the processes of `group`. Once; the sums are given away.
  std::array<InputStats, kTapCount> finish(const ProcessGroup& group = {});
  InputStats finish(Tap tap, const ProcessGroup& group);

 private:
  std::array<std::optional<StatsAccumulator>, kTapCount> accumulators_;
};

}  // namespace stbllm
