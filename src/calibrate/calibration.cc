#include "stbllm/calibrate/calibration.h"

#include <algorithm>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

/// One window of so many is held out; with fewer windows none is.
constexpr int64_t kWindowsPerHeldOut = 8;

}  // namespace

std::span<const std::vector<int32_t>> Calibration::first_training_windows(int64_t tokens) const {
  return std::span(windows).subspan(distill_only, std::min(training(), ceil_div(tokens, seqlen())));
}

Calibration make_calibration(const Checkpoint& checkpoint, const std::string& data, int64_t samples,
                             int64_t distill_samples, int64_t seqlen, uint64_t seed) {
  const Corpus corpus = read_corpus(data);
  const auto tokenizer = Tokenizer::load(checkpoint.directory());
  const std::vector<int32_t> ids = tokenizer->encode(corpus.text);
  Calibration calibration;
  calibration.holdout = samples / kWindowsPerHeldOut;
  calibration.distill_only = distill_samples;
  calibration.windows = calibration_windows(ids, samples + distill_samples,
                                            {samples - calibration.holdout, calibration.holdout}, seqlen,
                                            seed, corpus.description);
  std::rotate(calibration.windows.begin(), calibration.windows.begin() + samples, calibration.windows.end());
  calibration.provenance = {{"corpus", corpus.description},
                            {"sha256", corpus.sha256},
                            {"tokens", ids.size()},
                            {"nsamples", samples},
                            {"seqlen", seqlen},
                            {"seed", seed},
                            {"holdout", calibration.holdout},
                            {"distill_nsamples", distill_samples},
                            {"windows", "disjoint"}};
  return calibration;
}

Calibration share_of(const Calibration& calibration, const ProcessGroup& group) {
  if (group.size() == 1) return calibration;
  STBLLM_CHECK(calibration.distill_only == 0, "distillation works in one process");
  const int64_t training = calibration.training();
  if (training < group.size())
    fail(ErrorCode::kUsage,
         "{} calibration windows are too few for {} processes; pass a larger --nsamples or start fewer",
         training, group.size());
  const Share seen = share_of(training, group), held_out = share_of(calibration.holdout, group);
  const auto seen_from = calibration.windows.begin() + seen.first;
  const auto held_out_from = calibration.windows.begin() + training + held_out.first;
  Calibration share{.windows = {seen_from, seen_from + seen.count},
                    .distill_only = 0,
                    .holdout = held_out.count,
                    .provenance = calibration.provenance};
  share.windows.insert(share.windows.end(), held_out_from, held_out_from + held_out.count);
  return share;
}

}  // namespace stbllm
