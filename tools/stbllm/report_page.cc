#include "report_page.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <vector>

#include "commands.h"
#include "stbllm/plan/allocate.h"

namespace stbllm {
namespace {

using nlohmann::json;

constexpr std::array<const char*, 8> kColours = {"#2a78d6", "#d9662a", "#1a9e8c", "#b8860b",
                                                 "#b0509a", "#4a8f3b", "#7561c9", "#c94444"};
const char* colour(size_t index) { return kColours[index % kColours.size()]; }

constexpr const char* kStyle = R"css(
:root { --ink: #1d2330; --muted: #667085; --line: #e3e6ec; --page: #f6f7f9; --card: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaf0; --muted: #98a2b3; --line: #333a47; --page: #14171d; --card: #1c2028; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 20px 64px; background: var(--page); color: var(--ink);
       font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 0 0 10px; color: var(--muted); max-width: 80ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px;
          overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.facts b { display: block; font-size: 22px; font-weight: 600; }
.facts span, .legend { color: var(--muted); }
.legend span { margin-right: 16px; white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--muted); font: 12px system-ui, sans-serif; }
svg .value { fill: var(--ink); }
svg .grid { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--muted); font-weight: 500; }
)css";

std::string escape(const std::string& text) {
  std::string out;
  for (const char c : text) switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  return out;
}

struct Linear {
  const json* entry;
  int64_t block;     ///< -1: the name holds no number
  std::string role;  ///< "q_proj"
};

/// "model.layers.3.self_attn.q_proj": the first number is the block, the last part the role.
Linear parse_linear(const json& entry) {
  const std::string name = entry.at("name");
  Linear linear{&entry, -1, name.substr(name.rfind('.') + 1)};
  for (size_t begin = 0; begin < name.size() && linear.block < 0;) {
    const size_t end = std::min(name.find('.', begin), name.size());
    const std::string part = name.substr(begin, end - begin);
    const bool number =
        !part.empty() && part.size() < 6 && part.find_first_not_of("0123456789") == std::string::npos;
    if (number) linear.block = std::stoll(part);
    begin = end + 1;
  }
  return linear;
}

/// 1, 2 or 5 times a power of ten: the distance of grid lines so that about `count` fit into `span`.
double grid_step(double span, int count) {
  const double rough = span / count, power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double factor : {1.0, 2.0, 5.0})
    if (factor * power >= rough) return factor * power;
  return 10 * power;
}

struct Series {
  std::string name;
  std::vector<std::pair<int64_t, double>> points;  ///< (block, value), by block
};

std::string legend(const std::vector<std::string>& names) {
  std::string out = "<div class=\"legend\">";
  for (size_t i = 0; i < names.size(); ++i)
    out += fmt::format("<span><i style=\"background:{}\"></i>{}</span>", colour(i), escape(names[i]));
  return out + "</div>";
}

/// Lines over the blocks, from zero up.
std::string line_chart(const std::vector<Series>& series, const std::string& what) {
  constexpr double kWidth = 1000, kHeight = 280, kLeft = 64, kRight = 14, kTop = 12, kBottom = 38;
  int64_t last = 1;
  double largest = 0;
  for (const Series& s : series)
    for (const auto& [block, value] : s.points) {
      last = std::max(last, block);
      if (std::isfinite(value)) largest = std::max(largest, value);
    }
  if (largest <= 0) largest = 1;
  const double step = grid_step(largest, 5), top = step * std::ceil(largest / step - 1e-9);
  const auto x = [&](double block) {
    return kLeft + (kWidth - kLeft - kRight) * block / static_cast<double>(last);
  };
  const auto y = [&](double value) { return kHeight - kBottom - (kHeight - kTop - kBottom) * value / top; };
  std::string out = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth, kHeight,
                                escape(what));
  for (int i = 0; i * step <= top * 1.0001; ++i)
    out += fmt::format(
        "<line class=\"grid\" x1=\"{0}\" x2=\"{1}\" y1=\"{2:.1f}\" y2=\"{2:.1f}\"/>"
        "<text x=\"{3}\" y=\"{4:.1f}\" text-anchor=\"end\">{5:.4g}</text>",
        kLeft, kWidth - kRight, y(i * step), kLeft - 8, y(i * step) + 4, i * step);
  const auto tick = std::max<int64_t>(1, static_cast<int64_t>(grid_step(static_cast<double>(last), 12)));
  for (int64_t block = 0; block <= last; block += tick)
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                       x(static_cast<double>(block)), kHeight - 20, block);
  out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">block</text>",
                     (kLeft + kWidth - kRight) / 2, kHeight - 3);
  for (size_t i = 0; i < series.size(); ++i) {
    std::string path, dots;
    for (const auto& [block, value] : series[i].points) {
      if (!std::isfinite(value)) continue;
      const double px = x(static_cast<double>(block)), py = y(value);
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", px, py);
      dots += fmt::format(
          "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"><title>{}, block {}: "
          "{:.5g}</title></circle>",
          px, py, colour(i), escape(series[i].name), block, value);
    }
    out += fmt::format(
        "<path d=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\" stroke-linejoin=\"round\"/>{}", path,
        colour(i), dots);
  }
  return out + "</svg>";
}

struct Bar {
  std::string name;
  double value;
  std::string label;
};

std::string bar_chart(const std::vector<Bar>& bars, const std::string& what) {
  constexpr double kWidth = 1000, kRow = 24, kLeft = 210, kRight = 210;
  double largest = 1e-30;
  for (const Bar& bar : bars) largest = std::max(largest, bar.value);
  std::string out = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth,
                                kRow * static_cast<double>(bars.size()) + 4, escape(what));
  for (size_t i = 0; i < bars.size(); ++i) {
    const double y = kRow * static_cast<double>(i) + 4,
                 width = std::max(1.0, (kWidth - kLeft - kRight) * bars[i].value / largest);
    out += fmt::format(
        "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>"
        "<rect x=\"{}\" y=\"{}\" width=\"{:.1f}\" height=\"16\" rx=\"3\" fill=\"{}\"/>"
        "<text class=\"value\" x=\"{:.1f}\" y=\"{}\">{}</text>",
        kLeft - 10, y + 12, escape(bars[i].name), kLeft, y, width, colour(0), kLeft + width + 8, y + 12,
        escape(bars[i].label));
  }
  return out + "</svg>";
}

std::string code_of(const json& entry) {
  return Code{NmPattern::parse(entry.at("nm").get<std::string>()), entry.value("levels", 1)}.str();
}

/// Roles down, blocks across; a cell's colour is its code.
std::string code_grid(const std::vector<Linear>& linears, const std::vector<std::string>& roles,
                      const std::vector<std::string>& codes) {
  constexpr double kWidth = 1000, kLeft = 90, kRow = 22;
  int64_t last = 0;
  for (const Linear& linear : linears) last = std::max(last, linear.block);
  const double cell = std::min(40.0, (kWidth - kLeft) / static_cast<double>(last + 1));
  const double height = kRow * static_cast<double>(roles.size()) + 22;
  std::string out = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"code of each linear\">",
                                kWidth, height);
  for (size_t r = 0; r < roles.size(); ++r)
    out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", kLeft - 10,
                       kRow * static_cast<double>(r) + 15, escape(roles[r]));
  for (const Linear& linear : linears) {
    if (linear.block < 0) continue;
    const std::string code = code_of(*linear.entry);
    const auto row = std::find(roles.begin(), roles.end(), linear.role) - roles.begin();
    const auto which = std::find(codes.begin(), codes.end(), code) - codes.begin();
    out += fmt::format(
        "<rect x=\"{:.1f}\" y=\"{}\" width=\"{:.1f}\" height=\"{}\" rx=\"2\" fill=\"{}\"><title>{}: "
        "{}</title></rect>",
        kLeft + cell * static_cast<double>(linear.block), kRow * static_cast<double>(row), cell - 2, kRow - 2,
        colour(which), escape(linear.entry->at("name")), escape(code));
  }
  const auto tick = std::max<int64_t>(1, static_cast<int64_t>(grid_step(static_cast<double>(last + 1), 12)));
  for (int64_t block = 0; block <= last; block += tick)
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                       kLeft + cell * (static_cast<double>(block) + 0.5) - 1, height - 6, block);
  return out + "</svg>";
}

std::string section(const std::string& title, const std::string& text, const std::string& content) {
  return fmt::format("<section><h2>{}</h2><p>{}</p>{}</section>\n", title, text, content);
}

std::string fact(const std::string& value, const std::string& what) {
  return fmt::format("<div><b>{}</b><span>{}</span></div>", escape(value), what);
}

/// "0.0123", or a dash for what was not measured.
std::string number(const json& entry, const char* key, int digits) {
  const double value = entry.value(key, -1.0);
  return value < 0 ? "–" : fmt::format("{:.{}f}", value, digits);
}

std::string linear_table(const std::vector<Linear>& linears,
                         const std::map<std::string, const json*>& stored) {
  std::string out =
      "<table><thead><tr><th>linear</th><th>shape</th><th>code</th><th>stored "
      "bits</th><th>salient</th><th>threshold</th>"
      "<th>error</th><th>held out</th><th>shrink</th><th>damping</th><th>seconds</th></tr></thead><tbody>\n";
  for (const Linear& linear : linears) {
    const json& entry = *linear.entry;
    const auto counts = entry.value("salient_count", std::vector<int64_t>{});
    const auto thresholds = entry.value("threshold", std::vector<double>{});
    const double mean = thresholds.empty() ? -1
                                           : std::accumulate(thresholds.begin(), thresholds.end(), 0.0) /
                                                 static_cast<double>(thresholds.size());
    const auto found = stored.find(entry.at("name").get<std::string>());
    out += fmt::format(
        "<tr><td>{}</td><td>{} × "
        "{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{:g}</"
        "td><td>{}</td></tr>\n",
        escape(entry.at("name")), entry.at("rows").get<int64_t>(), entry.at("cols").get<int64_t>(),
        escape(code_of(entry)), found == stored.end() ? "–" : number(*found->second, "stored_bits", 3),
        std::accumulate(counts.begin(), counts.end(), int64_t{0}),
        mean < 0 ? "–" : fmt::format("{:.4g}", mean), number(entry, "output_error", 4),
        number(entry, "holdout_error", 4), number(entry, "shrink", 2), entry.value("damping", 0.0),
        number(entry, "seconds", 2));
  }
  return out + "</tbody></table>";
}

}  // namespace

std::string report_page(const json& run) {
  std::vector<Linear> linears;
  std::vector<std::string> roles, codes;
  const auto note = [](std::vector<std::string>& known, const std::string& name) {
    if (std::find(known.begin(), known.end(), name) == known.end()) known.push_back(name);
  };
  for (const json& entry : run.at("linears")) {
    linears.push_back(parse_linear(entry));
    note(roles, linears.back().role);
    note(codes, code_of(entry));
  }
  std::vector<Series> errors;
  for (const std::string& role : roles) {
    Series& series = errors.emplace_back(role);
    for (const Linear& linear : linears)
      if (linear.role == role)
        series.points.emplace_back(std::max<int64_t>(linear.block, 0), linear.entry->at("output_error"));
  }

  const std::string recipe = run.at("recipe").at("name");
  const json calibration = run.value("calibration", json::object());
  std::string page = fmt::format(
      "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title>"
      "<meta name=\"viewport\" "
      "content=\"width=device-width\"><style>{1}</style></head><body>\n<h1>{0}</h1>\n",
      escape(run.at("output")), kStyle);
  page += fmt::format("<p>recipe {}, calibrated on {} windows of {} tokens from {}</p>\n", escape(recipe),
                      calibration.value("nsamples", int64_t{0}), calibration.value("seqlen", int64_t{0}),
                      escape(calibration.value("corpus", "")));

  const json ledger = run.value("ledger", json::object());
  std::string facts =
      fact(fmt::format("{:.3f}", run.at("nominal_bits").get<double>()), "nominal bits per weight");
  if (!ledger.empty()) {
    facts += fact(number(ledger, "stored_bits", 3), "stored bits per weight of linears");
    facts += fact(number(ledger, "file_bits", 3), "bits per parameter, whole file");
    facts += fact(human_bytes(ledger.at("file_bytes")), "file");
  }
  if (const json distill = run.value("distill", json::object()); !distill.empty())
    facts += fact(number(distill, "divergence_before", 3) + " → " + number(distill, "divergence_after", 3),
                  "nats per token from the dense logits, by distillation");
  facts += fact(fmt::format("{:.1f} s", run.at("seconds").get<double>()), "time");
  facts += fact(human_bytes(run.at("peak_memory_bytes")), "peak memory");
  page += "<section class=\"facts\">" + facts + "</section>\n";

  page += section("Error of each linear",
                  "Relative squared error of the outputs on the calibration inputs, tr(D H Dᵀ) / tr(W H Wᵀ).",
                  line_chart(errors, "error of each linear over depth") + legend(roles));
  page +=
      section("Code of each linear", "N:M: how many weights of each group are kept; xL: at how many levels.",
              code_grid(linears, roles, codes) + legend(codes));

  if (const json blocks = run.value("blocks", json::array()); !blocks.empty()) {
    Series error{"relative error", {}}, angle{"1 − cosine", {}}, before{"before tuning", {}},
        after{"after tuning", {}};
    for (size_t i = 0; i < blocks.size(); ++i) {
      const auto block = static_cast<int64_t>(i);
      error.points.emplace_back(block, blocks[i].at("relative_error"));
      angle.points.emplace_back(block, 1 - blocks[i].at("cosine").get<double>());
      if (!blocks[i].contains("tune")) continue;
      before.points.emplace_back(block, blocks[i]["tune"].at("loss_before"));
      after.points.emplace_back(block, blocks[i]["tune"].at("loss_after"));
    }
    page += section("Hidden states after each block",
                    "Against the dense model's on the calibration windows, mean over tokens: squared error "
                    "relative to the dense norm, and the distance of the cosine from one.",
                    line_chart({error, angle}, "distance of the hidden states over depth") +
                        legend({error.name, angle.name}));
    if (!before.points.empty())
      page += section("Reconstruction loss of each block", "What tuning minimises, on the held-out windows.",
                      line_chart({before, after}, "loss of each block before and after tuning") +
                          legend({before.name, after.name}));
  }

  std::map<std::string, const json*> stored;
  if (!ledger.empty()) {
    for (const json& entry : ledger.at("linears")) stored[entry.at("name")] = &entry;
    const double total = ledger.at("file_bytes").get<double>(),
                 weights = std::max(1.0, ledger.at("linear_weights").get<double>());
    std::vector<Bar> bars;
    const auto add = [&](const std::string& name, double bytes, const std::string& extra) {
      bars.push_back(
          {name, bytes, fmt::format("{}  {:.1f} %{}", human_bytes(bytes), 100 * bytes / total, extra)});
    };
    for (const auto& [plane, bytes] : ledger.at("plane_bytes").items())
      add(plane, bytes, fmt::format("  {:.3f} bits/weight", 8 * bytes.get<double>() / weights));
    add("embedding, head, norms, biases", ledger.at("dense_bytes"), "");
    add("header, tokenizer, padding",
        total - ledger.at("linear_bytes").get<double>() - ledger.at("dense_bytes").get<double>(), "");
    page += section(
        "Bit ledger",
        "Where the bytes of the file are; bits per weight count the weights of the quantized linears.",
        bar_chart(bars, "bytes per kind of plane"));
  }
  if (const json stages = run.value("stages", json::array()); !stages.empty()) {
    std::vector<Bar> bars;
    for (const json& stage : stages) {
      const double seconds = stage.at("seconds"), flops = stage.value("flops", 0.0);
      bars.push_back({stage.at("name"), seconds,
                      fmt::format("{:.2f} s{}", seconds,
                                  flops > 0 ? fmt::format("  {:.1f} GFLOP/s", flops / seconds / 1e9) : "")});
    }
    page +=
        section("Time by stage", "Seconds of this run; a stage after a slash is part of the one before it.",
                bar_chart(bars, "seconds per stage"));
  }
  page += section("Linears",
                  "Salient: columns with a residual. Threshold: mean of p1 over column blocks. Damping: of "
                  "the mean diagonal of H, after retries.",
                  linear_table(linears, stored));
  return page + "</body></html>\n";
}

}  // namespace stbllm
