#pragma once
// HTML pages that draw themselves and load nothing: the files of tools/stbllm/page/ with what they draw
// inside.

#include <nlohmann/json.hpp>
#include <string>

namespace stbllm {

/// Reads what the page of a report cannot do without, so that another file is refused here and not by an
/// empty page. Throws nlohmann::json::exception where `run` lacks something of it.
void check_report(const nlohmann::json& run);
/// The page of a report of `stbllm quantize --report`. Throws nlohmann::json::exception where `run` lacks
/// what every report has.
std::string report_page(const nlohmann::json& run);
/// The page of what read_sweeps() or weights_figure() returned.
std::string figure_page(const nlohmann::json& figure);

}  // namespace stbllm
