#pragma once
// The weights of a linear by what became of them, as the page draws them.

#include <nlohmann/json.hpp>
#include <string>

namespace stbllm {

/// {"weights": ...}: a histogram of the weights that `linear` has in `checkpoint`, a directory, by their
/// classes in the file `packed`: not kept, kept at each level, in a salient or an outlier column. Throws
/// Error(kUsage) when the file has no such linear, and as PackedReader and Checkpoint do.
nlohmann::json weights_figure(const std::string& packed, const std::string& checkpoint,
                              const std::string& linear);

}  // namespace stbllm
