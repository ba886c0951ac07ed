#pragma once
// Where the state of a training is kept while it goes on.

#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/train/latent_weight.h"

namespace stbllm {

class TrainingStore {
 public:
  /// Shows a visitor every tensor of the state.
  using VisitState = std::function<void(const StateVisitor&)>;

  virtual ~TrainingStore() = default;
  /// Keeps the tensors that `visit_state` shows, what `progress` says, and the best blocks so far.
  virtual void save(const nlohmann::json& progress, const std::vector<QuantizedBlock>& best,
                    const VisitState& visit_state) = 0;
  /// Puts the tensors and the blocks back and returns the progress; nothing when none was kept for this
  /// training.
  virtual std::optional<nlohmann::json> load(std::vector<QuantizedBlock>& best,
                                             const VisitState& visit_state) = 0;
};

}  // namespace stbllm
