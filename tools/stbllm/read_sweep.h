#pragma once
// What scripts/sweep.sh leaves in a directory, and points of other tools beside it, as the page draws them.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace stbllm {

/// {"sweep": {"title", "texts", "points", "levels"}} of the sweep.jsonl of each directory:
///   texts   what perplexities were measured on: "name", which is short, and "about", which says all
///   points  one per run: "tool" (empty: this program), "model", "label", "bits" (stored, per weight of the
///           linears), "nominal_bits", "file_bytes", "flipped_signs" (a share; null: not that kind of sweep),
///           "seconds", "peak_memory_bytes", "run" (its report) and "results": per text its index "text",
///           "perplexity", "standard_error", "kl"
///   levels  perplexities to compare with: "label", "text", "perplexity"
/// `other` is a CSV file with points of other tools, empty for none; its first line names the columns:
///   tool, label, perplexity          needed
///   bits, file_bytes                 a row with neither becomes a level
///   standard_error                   of the perplexity
///   text                             name of one of the texts; the only one or the first where it is left
///   out
/// Numbers that are not known are null. Throws Error(kNotFound) where a directory holds no sweep,
/// Error(kCorrupt) naming file and line of what cannot be read.
nlohmann::json read_sweeps(const std::vector<std::string>& directories, const std::string& other);

}  // namespace stbllm
