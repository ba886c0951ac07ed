#pragma once
// The text that a run calibrates on, as windows of token ids.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/processes/process_group.h"
#include "stbllm/text/windows.h"

namespace stbllm {

struct Calibration {
  Windows windows;               ///< equally long
  int64_t distill_only = 0;      ///< the first so many are seen by distillation only
  int64_t holdout = 0;           ///< the last so many are kept out of H and of training
  int64_t windows_in_texts = 0;  ///< so many could be drawn before one of the texts has to be used again
  nlohmann::json provenance;  ///< corpus, sha256 (of several texts: "texts" with these), counts, seed: stored
                              ///< in the packed file and in the fingerprint of a run

  int64_t seqlen() const { return std::ssize(windows.front()); }
  /// Windows behind H.
  int64_t training() const { return std::ssize(windows) - distill_only - holdout; }
  /// The first of them, so many that they have `tokens` tokens where there are enough.
  std::span<const std::vector<int32_t>> first_training_windows(int64_t tokens) const;
};

/// A text that windows are drawn from, as read_corpus() knows it, and its share of them beside other texts.
struct CalibrationText {
  std::string data;
  double weight = 1;

  /// "c4" or "c4=3". Throws Error(kUsage) for a weight that is not above 0.
  static CalibrationText parse(const std::string& argument);
};

/// The sum of their weights.
double total_weight(std::span<const CalibrationText> texts);

/// Random windows of texts for a checkpoint's tokenizer, which do not overlap while a text lasts; those of
/// several texts take turns. Throws Error(kTooLittleText), and Error(kUsage) when there are too few windows
/// for a text to get one. A share of 1/8 of the `samples` windows (none when there are fewer than 8) is held
/// out to report errors and to judge training. `distill_samples` more are for distillation only.
Calibration make_calibration(const Checkpoint& checkpoint, std::span<const CalibrationText> texts,
                             int64_t samples, int64_t distill_samples, int64_t seqlen, uint64_t seed);
/// The same with one text.
Calibration make_calibration(const Checkpoint& checkpoint, const std::string& data, int64_t samples,
                             int64_t distill_samples, int64_t seqlen, uint64_t seed);

/// The windows of one process: its share of those that make H and of those held out. Throws Error(kUsage)
/// when there are too few.
Calibration share_of(const Calibration& calibration, const ProcessGroup& group);

}  // namespace stbllm
