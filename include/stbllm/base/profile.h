#pragma once
// Where the time of a long command goes: seconds and floating-point operations per stage.
//
//   {
//     StageTimer timer("statistics", 2 * weights * tokens);
//     ...
//   }
//
// A stage that is timed inside another one is listed under it; the seconds of the outer one include it.
// Timers belong to the thread that drives the work, not to the loops that it splits over cores; each thread
// has stages of its own.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

struct Stage {
  std::string name;    ///< "shrink choice/encode": nested stages after a slash
  double seconds = 0;  ///< wall clock, nested stages included
  double flops = 0;    ///< floating-point operations that were announced, nested stages included
  int64_t calls = 0;
};

/// Times its own life as a stage. `flops` floating-point operations are done in it, nested stages excluded.
class StageTimer {
 public:
  explicit StageTimer(std::string_view name, double flops = 0);
  ~StageTimer();
  StageTimer(const StageTimer&) = delete;
  StageTimer& operator=(const StageTimer&) = delete;

 private:
  double started_;
  double flops_;
};

/// The stages of this thread since the last reset. An outer one stands before those inside it; otherwise they
/// are in the order of first use.
std::vector<Stage> profiled_stages();
void reset_profile();

}  // namespace stbllm
