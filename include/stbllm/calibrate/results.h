#pragma once
// What the stages of a quantization report, and its JSON: in the work directory, in the packed file and
// behind
// --report.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "stbllm/quantize/quantize_linear.h"

namespace stbllm {

struct LinearResult {
  std::string name;
  Scheme scheme;
  int64_t rows = 0, cols = 0;
  double salient_share = 0;
  LinearReport report;
};

struct TuneReport {
  double loss_before = 0, loss_after = 0;  ///< on the held-out windows, or on all when there are none
  double changed = 0;                      ///< share of weights whose symbol changed
  int epochs = 0;                          ///< until the smallest held-out loss
  double tokens_per_second = 0;            ///< of steps
};

struct DistillReport {
  double divergence_before = 0, divergence_after = 0;  ///< nats per token on the held-out windows, or on all
                                                       ///< when there are none
  double changed = 0;                                  ///< share of weights whose symbol changed
  int epochs = 0;                                      ///< until the smallest held-out divergence
  double tokens_per_second = 0;                        ///< of steps, since the last start
};

/// The hidden states after a block against those of the dense model, over all calibration windows; tokens
/// weigh the same, whatever their norm.
struct BlockResult {
  double cosine = 1;               ///< mean over tokens
  double relative_error = 0;       ///< mean over tokens of ||h - h_dense||^2 / ||h_dense||^2
  std::optional<TuneReport> tune;  ///< where the block was tuned
};

/// The seconds of a linear vary from run to run: they have no place in a packed file.
nlohmann::json to_json(const LinearResult& result, bool with_seconds);
LinearResult linear_result_from_json(const nlohmann::json& json);
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TuneReport, loss_before, loss_after, changed, epochs, tokens_per_second)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(DistillReport, divergence_before, divergence_after, changed, epochs,
                                   tokens_per_second)
void to_json(nlohmann::json& json, const BlockResult& result);

}  // namespace stbllm
