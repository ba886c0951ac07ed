#pragma once
// A model to run, from either kind of file, with its tokenizer.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "stbllm/model/decoder.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {

struct LoadedModel {
  std::string path;
  Decoder decoder;
  std::unique_ptr<Tokenizer> tokenizer;
  std::string backend;  ///< "dense" for a checkpoint
  /// Of the texts a packed model was calibrated on, and of their windows (text/overlap.h); none for a
  /// checkpoint.
  std::vector<std::string> calibration_sha256, calibration_marks;

  /// What ends a text: ids of the configuration, and the tokenizer's.
  std::vector<int32_t> stop_ids() const;
};

/// `path` is a packed file or a checkpoint directory; dtype "float32" or "bfloat16". `keep_blocks`: dense
/// blocks stay in memory once loaded (generation runs through them again and again).
LoadedModel load_model(const std::string& path, const std::string& backend, const std::string& dtype,
                       bool keep_blocks = false);

}  // namespace stbllm
