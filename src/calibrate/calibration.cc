#include "stbllm/calibrate/calibration.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

/// One window of so many is held out; with fewer windows none is.
constexpr int64_t kWindowsPerHeldOut = 8;

/// Of all windows together: a gigabyte of ids, a thousand times what calibration takes as a rule.
constexpr int64_t kMostTokens = int64_t{1} << 28;

/// `total` windows divided by the weights of the texts: rounded down, and what is left over to those that
/// lost most by that.
std::vector<int64_t> divide(int64_t total, std::span<const CalibrationText> texts) {
  const double sum = total_weight(texts);
  std::vector<int64_t> counts;
  std::vector<std::pair<double, size_t>> losses;
  int64_t left = total;
  for (size_t i = 0; i < texts.size(); ++i) {
    const double exact = static_cast<double>(total) * texts[i].weight / sum;
    counts.push_back(static_cast<int64_t>(exact));
    losses.emplace_back(static_cast<double>(counts.back()) - exact, i);
    left -= counts.back();
  }
  std::ranges::sort(losses);
  for (int64_t k = 0; k < left; ++k) ++counts[losses[static_cast<size_t>(k)].second];
  return counts;
}

/// The windows of all parts, which take turns so that each part is spread evenly.
Windows take_turns(const std::vector<Windows>& parts) {
  std::vector<std::tuple<double, size_t, size_t>> order;  // place from 0 to 1, part, window
  for (size_t p = 0; p < parts.size(); ++p)
    for (size_t w = 0; w < parts[p].size(); ++w)
      order.emplace_back((static_cast<double>(w) + 0.5) / static_cast<double>(parts[p].size()), p, w);
  std::ranges::sort(order);
  Windows windows;
  for (const auto& [place, part, window] : order) windows.push_back(parts[part][window]);
  return windows;
}

}  // namespace

std::span<const std::vector<int32_t>> Calibration::first_training_windows(int64_t tokens) const {
  return std::span(windows).subspan(distill_only, std::min(training(), ceil_div(tokens, seqlen())));
}

CalibrationText CalibrationText::parse(const std::string& argument) {
  const size_t equals = argument.rfind('=');
  if (equals == std::string::npos || std::filesystem::exists(argument)) return {.data = argument};
  const std::string weight = argument.substr(equals + 1);
  double value = 0;
  const auto [end, error] = std::from_chars(weight.data(), weight.data() + weight.size(), value);
  if (error != std::errc() || end != weight.data() + weight.size() || !(value > 0) || !std::isfinite(value))
    fail(ErrorCode::kUsage, "--calib {}: expected TEXT or TEXT=WEIGHT with a weight above 0", argument);
  return {.data = argument.substr(0, equals), .weight = value};
}

double total_weight(std::span<const CalibrationText> texts) {
  return std::transform_reduce(texts.begin(), texts.end(), 0.0, std::plus(),
                               [](const CalibrationText& text) { return text.weight; });
}

Calibration make_calibration(const Checkpoint& checkpoint, std::span<const CalibrationText> texts,
                             int64_t samples, int64_t distill_samples, int64_t seqlen, uint64_t seed) {
  const int64_t most = kMostTokens / std::max<int64_t>(seqlen, 1);
  if (samples > most || distill_samples > most - samples)
    fail(ErrorCode::kUsage,
         "{} and {} windows of {} tokens are more than {} tokens; pass a smaller --nsamples, "
         "--distill-nsamples or --seqlen",
         samples, distill_samples, seqlen, kMostTokens);
  const auto tokenizer = Tokenizer::load(checkpoint.directory());
  Calibration calibration;
  calibration.holdout = samples / kWindowsPerHeldOut;
  calibration.distill_only = distill_samples;
  const std::vector<int64_t> training = divide(samples - calibration.holdout, texts),
                             held_out = divide(calibration.holdout, texts),
                             distill_only = divide(distill_samples, texts);
  std::vector<Windows> of_distill, of_training, of_holdout;
  nlohmann::json sources = nlohmann::json::array();
  std::string names;
  int64_t tokens = 0;
  double in_texts = std::numeric_limits<double>::infinity();
  for (size_t i = 0; i < texts.size(); ++i) {
    const Corpus corpus = read_corpus(texts[i].data);
    const std::vector<int32_t> ids = tokenizer->encode(corpus.text);
    const int64_t count = training[i] + held_out[i] + distill_only[i];
    if (training[i] == 0)
      fail(ErrorCode::kUsage, "{} gets none of {} calibration windows; pass a larger --nsamples or weight",
           corpus.description, samples);
    const Windows windows =
        calibration_windows(ids, count, {training[i], held_out[i]}, seqlen, seed, corpus.description);
    const auto part = [&](int64_t first, int64_t size) {
      return Windows(windows.begin() + first, windows.begin() + first + size);
    };
    of_training.push_back(part(0, training[i]));
    of_holdout.push_back(part(training[i], held_out[i]));
    of_distill.push_back(part(training[i] + held_out[i], distill_only[i]));
    sources.push_back({{"corpus", corpus.description},
                       {"sha256", corpus.sha256},
                       {"tokens", ids.size()},
                       {"weight", texts[i].weight}});
    names += (i > 0 ? " + " : "") + corpus.description;
    tokens += std::ssize(ids);
    in_texts = std::min(
        in_texts, static_cast<double>(std::ssize(ids) / seqlen) * total_weight(texts) / texts[i].weight);
  }
  calibration.windows_in_texts = static_cast<int64_t>(in_texts);
  for (const auto& parts : {of_distill, of_training, of_holdout})
    for (std::vector<int32_t>& window : take_turns(parts)) calibration.windows.push_back(std::move(window));
  calibration.provenance = {{"corpus", names},
                            {"tokens", tokens},
                            {"nsamples", samples},
                            {"seqlen", seqlen},
                            {"seed", seed},
                            {"holdout", calibration.holdout},
                            {"distill_nsamples", distill_samples},
                            {"windows", "disjoint"}};
  if (texts.size() == 1)
    calibration.provenance["sha256"] = sources[0]["sha256"];
  else
    calibration.provenance["texts"] = sources;
  return calibration;
}

Calibration make_calibration(const Checkpoint& checkpoint, const std::string& data, int64_t samples,
                             int64_t distill_samples, int64_t seqlen, uint64_t seed) {
  const CalibrationText text{.data = data};
  return make_calibration(checkpoint, std::span(&text, 1), samples, distill_samples, seqlen, seed);
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
                    .windows_in_texts = calibration.windows_in_texts,
                    .provenance = calibration.provenance};
  share.windows.insert(share.windows.end(), held_out_from, held_out_from + held_out.count);
  return share;
}

}  // namespace stbllm
