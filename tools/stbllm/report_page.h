#pragma once
// A report of `stbllm quantize --report` as one HTML page, which draws itself and loads nothing.

#include <nlohmann/json.hpp>
#include <string>

namespace stbllm {

/// report.html with `run` inside. Throws nlohmann::json::exception where `run` lacks what every report has.
std::string report_page(const nlohmann::json& run);

}  // namespace stbllm
