#pragma once
// The finished blocks and what is left of the checkpoint as one model: a packed file, or a directory of
// dequantized weights.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <span>
#include <vector>

#include "stbllm/calibrate/quantized_block.h"
#include "stbllm/model/decoder.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/run/tables.h"

namespace stbllm {

struct Assembly {
  const Checkpoint& checkpoint;
  const ModelSpec& spec;
  const StoredTables& tables;
  int64_t quantized_blocks;                          ///< the others stay dense
  std::function<QuantizedBlock(int64_t)> quantized;  ///< a finished block
};

/// Adds all tensors to `file`, in the order of the checkpoint's blocks.
void write_packed(PackedWriter& file, const Assembly& assembly);

/// A HuggingFace directory of dequantized weights: configuration and tokenizer are those of the checkpoint.
/// It is assembled beside `output` and appears under its name as a whole, in place of the checkpoint that was
/// there; other files in the directory stay. Throws Error(kWriteFailed).
void export_dense(const std::filesystem::path& output, const Assembly& assembly);

/// Tokens whose logits verify_packed compares at a time.
inline constexpr int64_t kTokensPerVerification = 128;

/// Relative L2 distance between the logits of the packed file and those of the assembled blocks as dense
/// weights in float32. Throws Error(kVerifyFailed).
double verify_packed(const std::filesystem::path& path, const Assembly& assembly,
                     std::span<const std::vector<int32_t>> windows);

}  // namespace stbllm
