#pragma once
// A packed file as a GGUF file, which llama.cpp and what is built on it run.

#include <filesystem>
#include <map>

#include "stbllm/export/gguf_writer.h"
#include "stbllm/pack/packed_file.h"

namespace stbllm {

struct GgufOptions {
  GgufType ternary = GgufType::kTQ2_0;  ///< of linears: kTQ1_0 takes 1.69 bits a weight, kTQ2_0 2.06
  /// Linears that are not ternary in blocks of 256 columns become F16, rounded, instead of being refused.
  bool dequantize = false;
  bool force = false;  ///< replaces a file that is there
};

struct GgufSummary {
  std::map<GgufType, int64_t> linears;  ///< how many have each type
  int64_t bytes = 0;                    ///< of the file
};

/// Linears keep their values exactly as ternary types, tables of 8- and 4-bit integers as Q8_0 and Q4_0;
/// norms and biases become F32. Configuration and tokenizer become keys. Throws Error(kUnsupported) naming a
/// linear that is not ternary, or an architecture, an activation or a tokenizer that llama.cpp does not know;
/// Error(kExists | kWriteFailed | kCorrupt).
GgufSummary export_gguf(const PackedReader& packed, const std::filesystem::path& path,
                        const GgufOptions& options);

}  // namespace stbllm
