#pragma once
// A packed model with wrong signs: what a model takes before it breaks says how redundant its signs are
// (Figure 1 of the STBLLM paper).

#include <cstdint>
#include <filesystem>

#include "stbllm/pack/packed_file.h"

namespace stbllm {

struct FlippedSigns {
  int64_t kept = 0;     ///< signs that could be flipped
  int64_t flipped = 0;  ///< those that were
};

/// Writes `packed` to `path` with signs of its kept weights flipped, each with probability `share` (0 to 1)
/// by random numbers of `seed`. Weights of salient and outlier columns stay, as in the paper. Throws as
/// PackedWriter.
FlippedSigns flip_signs(const PackedReader& packed, const std::filesystem::path& path, double share,
                        uint64_t seed, bool force);

}  // namespace stbllm
