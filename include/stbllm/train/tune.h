#pragma once
// Block-wise reconstruction: after a block is quantized, its codes, row scales, levels, norms and biases are
// optimised with Adam so that its outputs match the dense model's on the calibration windows.
//
//   loss = mean_t w_t^2 ||block(x_t) - y_t||^2 / mean_t w_t^2 ||y_t - x_t||^2,   w_t = min(1, 3 median ||y||
//   / ||y_t||)
//
// Codes move through a straight-through estimator: each weight has a latent value in units of its scale; the
// forward pass uses the N largest of a group with their signs and nearest levels, the gradient goes to the
// latent as if nothing was rounded.

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {

/// Optimises `quantized` in place; `block` holds the dense weights and is used up. `inputs` are the states
/// that enter the block and `targets` those that should leave it (the extra windows of either have no part).
/// The held-out windows only judge: the best epoch on them is kept. Deterministic.
TuneReport tune_block(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized,
                      const HiddenStream& inputs, const HiddenStream& targets, const TrainingStage& stage);

}  // namespace stbllm
