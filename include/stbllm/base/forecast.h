#pragma once
// How long a run will still take: what was predicted for its stages, corrected by what they took so far.

#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

struct ExpectedStage {
  std::string name;
  double seconds = 0;  ///< predicted
};

/// Times are seconds since the run began.
class Forecast {
 public:
  explicit Forecast(std::vector<ExpectedStage> stages);
  /// Whether there is a stage of that name.
  bool knows(std::string_view stage) const;
  /// A stage begins at `time`; those before it are over. Does nothing when it has begun already.
  void begin(std::string_view stage, double time);
  /// The share of the run that is over when `fraction` of the current stage is, in predicted time.
  double done(double fraction) const;
  /// Seconds to the end of the run, when `fraction` of the current stage is over at `time`. The current stage
  /// goes on as it went, those behind it err as the run did so far; predictions count where little was
  /// measured yet.
  double left(double fraction, double time) const;

 private:
  double before() const;  ///< predicted seconds of the stages before the current one

  std::vector<ExpectedStage> stages_;
  size_t current_ = 0;
  double began_ = 0, predicted_ = 0;
};

}  // namespace stbllm
