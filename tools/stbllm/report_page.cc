#include "report_page.h"

#include <string_view>

#include "stbllm/base/error.h"

namespace stbllm {

/// The files of tools/stbllm/page/ in one, compiled in.
extern const std::string_view kReportTemplate;

namespace {

using nlohmann::json;

/// JSON that can stand inside a <script> element: "<" occurs within strings only, where \u003c means the
/// same, and without it neither "</script>" nor "<!--" can end or change the element.
std::string script_text(const json& figure) {
  std::string text;
  for (const char c : figure.dump(-1, ' ', /*ensure_ascii=*/false, json::error_handler_t::replace))
    if (c == '<')
      text += "\\u003c";
    else
      text += c;
  return text;
}

}  // namespace

void check_report(const json& run) {
  run.at("output").get<std::string>();
  run.at("recipe").at("name").get<std::string>();
  for (const char* number : {"nominal_bits", "seconds", "peak_memory_bytes"}) run.at(number).get<double>();
  for (const json& linear : run.at("linears")) {
    for (const char* text : {"name", "nm"}) linear.at(text).get<std::string>();
    for (const char* number : {"rows", "cols", "output_error"}) linear.at(number).get<double>();
  }
}

std::string figure_page(const json& figure) {
  constexpr std::string_view kBefore = R"(type="application/json">)", kEmpty = "null";
  const size_t at = kReportTemplate.find(kBefore);
  STBLLM_CHECK(
      at != std::string_view::npos && kReportTemplate.substr(at + kBefore.size()).starts_with(kEmpty),
      "the template has no place for a report");
  std::string page(kReportTemplate);
  return page.replace(at + kBefore.size(), kEmpty.size(), script_text(figure));
}

std::string report_page(const json& run) {
  check_report(run);
  return figure_page(run);
}

}  // namespace stbllm
