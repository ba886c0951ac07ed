#pragma once
// A report of `stbllm quantize --report` as one HTML page: inline SVG, no scripts, nothing fetched.

#include <nlohmann/json.hpp>
#include <string>

namespace stbllm {

/// Throws nlohmann::json::exception where `run` lacks what every report has.
std::string report_page(const nlohmann::json& run);

}  // namespace stbllm
