#pragma once
// A checkpoint in, a packed file out: block by block, the inputs of each block coming from the quantized
// blocks before it.
//
// Resident at any time: one decoder block, the Hessians of its four taps, the hidden states of the
// calibration windows (bfloat16), which go to a file where they do not fit. Every finished block is a file in
// a work directory beside the output, so that a run can be continued after any interruption; the finished
// model is assembled there, verified against the quantizer's own result, and renamed into place.

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "stbllm/checkpoint/checkpoint.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/model/model_spec.h"
#include "stbllm/pipeline/process_group.h"
#include "stbllm/pipeline/results.h"
#include "stbllm/quantize/recipe.h"

namespace stbllm {

struct Calibration {
  Windows windows;            ///< equally long
  int64_t distill_only = 0;   ///< the first so many are seen by distillation only
  int64_t holdout = 0;        ///< the last so many are kept out of H and of training
  nlohmann::json provenance;  ///< corpus, sha256, counts, seed: stored in the packed file and in the
                              ///< fingerprint of a run
};

/// Random windows of a corpus for a checkpoint's tokenizer, which do not overlap while the text lasts. Throws
/// Error(kTooLittleText). A share of 1/8 of the `samples` windows (none when there are fewer than 8) is held
/// out to choose shrinkage and to report errors. `distill_samples` more are for distillation only.
Calibration make_calibration(const Checkpoint& checkpoint, const std::string& data, int64_t samples,
                             int64_t distill_samples, int64_t seqlen, uint64_t seed);

struct QuantizeOptions {
  std::filesystem::path
      output;  ///< the packed file; with `dense_output` a HuggingFace directory of dequantized weights
  bool dense_output = false;
  bool force = false;          ///< overwrite `output`, discard an unfinished run
  bool resume = false;         ///< continue the unfinished run beside `output`
  int64_t blocks = -1;         ///< quantize only so many blocks, the others stay dense; below 0: all
  std::string device = "cpu";  ///< "cuda": forward passes, Hessians and what quantize_linear() does there run
                               ///< on the current device
  bool compare_blocks = false;  ///< run the dense model beside, for QuantizeResult::blocks
  int64_t max_memory = 0;       ///< bytes; hidden states go to a file where more would be needed. 0: no limit

  int64_t quantized_blocks(const ModelSpec& spec) const {
    return blocks < 0 ? spec.layers : std::min(blocks, spec.layers);
  }
};

struct QuantizeResult {
  std::vector<LinearResult> linears;
  std::vector<BlockResult> blocks;  ///< of the quantized blocks; empty unless there is a report, or training
  std::optional<DistillReport> distill;  ///< where the whole model was distilled
  double nominal_bits = 0;  ///< mean of N/M (1 + share of salient columns) over the quantized weights
  double seconds = 0;
  double verified_logits = -1;  ///< relative L2 distance of packed and dense logits; -1: nothing to verify
};

/// Whether the dense model's hidden states go along beside the quantized one's.
inline bool needs_dense_stream(const Recipe& recipe, const QuantizeOptions& options) {
  return recipe.tune_epochs > 0 || recipe.distill_epochs > 0 || options.compare_blocks;
}

/// Where `options` wants forward passes to run. Throws Error(kUnsupported), with the reason, where that is
/// impossible.
at::Device calibration_device(const QuantizeOptions& options);

/// Refuses what can be refused before `checkpoint`, a directory, is read: Error(kUnsupported | kUsage |
/// kExists).
void check_request(const std::filesystem::path& checkpoint, const Recipe& recipe,
                   const QuantizeOptions& options, const ProcessGroup& group);

/// Throws before the first expensive step: as check_request and plan_memory, and Error(kMismatch); later
/// Error(kWriteFailed | kVerifyFailed | kInterrupted, see base/interrupt.h). Deterministic, after a resume
/// too and whatever the number of threads (trained: one or two).
///
/// Several processes, all called with the same arguments, calibrate on their part of the windows and quantize
/// their part of the linears. Process 0 alone has the work directory and writes the output; the others return
/// when their last block is done, without what is computed after that. The result is that of one process but
/// for the rounding of sums.
QuantizeResult quantize_model(const Checkpoint& checkpoint, const Calibration& calibration,
                              const Recipe& recipe, const QuantizeOptions& options,
                              const ProcessGroup& group = {});

/// The windows of one process: its share of those that make H and of those held out. Throws Error(kUsage)
/// when there are too few.
Calibration share_of(const Calibration& calibration, const ProcessGroup& group);

}  // namespace stbllm
