#include "read_sweep.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string_view>

#include "report_page.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// What perplexities must share so that they can be compared.
struct Text {
  std::string data;
  int64_t seqlen, windows;
  bool second_half;

  bool operator==(const Text&) const = default;

  std::string scored() const { return second_half ? "second halves" : "all tokens"; }
  std::string about() const {
    return fmt::format("{}, {} windows of {} tokens{}", data, windows, seqlen,
                       second_half ? ", their second halves" : "");
  }
};

/// Names that say how the texts differ.
std::vector<std::string> names_of(const std::vector<Text>& texts) {
  const auto differ = [&](auto member) {
    return std::ranges::any_of(texts, [&](const Text& text) { return text.*member != texts[0].*member; });
  };
  const bool data = differ(&Text::data), seqlen = differ(&Text::seqlen), windows = differ(&Text::windows),
             scored = differ(&Text::second_half);
  std::vector<std::string> names;
  for (const Text& text : texts) {
    std::vector<std::string> parts;
    if (data || texts.size() == 1) parts.push_back(text.data);
    if (seqlen) parts.push_back(fmt::format("at {}", text.seqlen));
    if (windows) parts.push_back(fmt::format("{} windows", text.windows));
    if (scored) parts.push_back(text.scored());
    names.push_back(fmt::format("{}", fmt::join(parts, " ")));
  }
  return names;
}

/// `json` with a number under `key`, null where it has none.
json number_or_null(const json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_number() ? *found : json();
}

/// "wikitext-2-raw-v1 test (4358 rows)" without the count, which goes without saying in a name.
std::string without_count(const std::string& description) {
  const size_t bracket = description.ends_with(')') ? description.rfind(" (") : std::string::npos;
  return description.substr(0, bracket);
}

std::string last_name(const std::string& path) {
  const fs::path trimmed = path.ends_with('/') ? fs::path(path).parent_path() : fs::path(path);
  return trimmed.has_filename() ? trimmed.filename().string() : path;
}

class Sweep {
 public:
  /// Adds the points of `directory`. Throws as read_sweeps(), and json::exception for a line that lacks
  /// something.
  void add(const fs::path& directory) {
    const fs::path path = directory / "sweep.jsonl";
    if (!fs::exists(path))
      fail(ErrorCode::kNotFound,
           "{}: expected the directory of a sweep, with sweep.jsonl as scripts/sweep.sh writes it",
           directory.string());
    const std::string content = read_text(path);
    // A sweep that was killed may leave a piece of a line, which it removes when it is started again.
    const std::string_view whole = std::string_view(content).substr(0, content.rfind('\n') + 1);
    int number = 0;
    for (size_t begin = 0; begin < whole.size();) {
      const size_t end = whole.find('\n', begin);
      ++number;
      try {
        add_point(parse_json(whole.substr(begin, end - begin)), directory);
      } catch (const json::exception& error) {
        fail(ErrorCode::kCorrupt, "{}:{}: not a line of scripts/sweep.sh ({})", path.string(), number,
             error.what());
      }
      begin = end + 1;
    }
    if (number == 0)
      fail(ErrorCode::kNotFound, "{}: the sweep has no finished point yet; start it again", path.string());
  }

  void add_point_of_tool(json point) { points_.push_back(std::move(point)); }
  void add_level(json level) {
    if (std::ranges::find(levels_, level) == levels_.end()) levels_.push_back(std::move(level));
  }
  std::vector<std::string> text_names() const { return names_of(texts_); }

  json to_json() const {
    // Two checkpoints with one name go by their paths.
    std::map<std::string, std::set<std::string>> paths_of;
    for (const auto& path : checkpoints_) paths_of[last_name(path)].insert(path);
    json points = points_;
    for (json& point : points)
      if (const std::string path = point["model"]; !path.empty() && paths_of[last_name(path)].size() == 1)
        point["model"] = last_name(path);
    json texts = json::array();
    const std::vector<std::string> names = text_names();
    for (size_t t = 0; t < texts_.size(); ++t)
      texts.push_back({{"name", names[t]}, {"about", texts_[t].about()}});
    const std::string title =
        paths_of.size() == 1 ? paths_of.begin()->first : fmt::format("{} models", checkpoints_.size());
    return {{"sweep",
             {{"title", "Sweep of " + title}, {"texts", texts}, {"points", points}, {"levels", levels_}}}};
  }

 private:
  void add_point(const json& line, const fs::path& directory) {
    const json& options = line.at("options");
    json point = {{"tool", ""},
                  {"model", options.at("checkpoint").get<std::string>()},
                  {"label", options.at("label").get<std::string>()},
                  {"bits", line.at("stored_bits").get<double>()},
                  {"nominal_bits", line.at("nominal_bits").get<double>()},
                  {"file_bytes", line.at("file_bytes").get<double>()},
                  {"flipped_signs", number_or_null(line, "flipped_signs")},
                  {"seconds", number_or_null(line, "seconds")},
                  {"peak_memory_bytes", number_or_null(line, "peak_memory_bytes")},
                  {"run", nullptr},
                  {"results", json::array()}};
    const json& evaluations = line.at("evaluations");
    evaluations.at(0);  // there is one at least
    for (size_t i = 0; i < evaluations.size(); ++i) {
      const json& result = evaluations.at(i);
      const size_t text = index_of({.data = without_count(result.at("data").get<std::string>()),
                                    .seqlen = result.at("seqlen").get<int64_t>(),
                                    .windows = result.at("windows").get<int64_t>(),
                                    .second_half = result.value("second_half", false)});
      point["results"].push_back({{"text", text},
                                  {"perplexity", result.at("perplexity").get<double>()},
                                  {"standard_error", number_or_null(result, "standard_error")},
                                  {"kl", number_or_null(result, "kl")}});
      if (const json reference = number_or_null(result, "reference_perplexity"); !reference.is_null())
        add_level({{"label", name_of_reference(options, i)}, {"text", text}, {"perplexity", reference}});
    }
    if (line.contains("report")) point["run"] = read_run(directory, line["report"].get<std::string>());
    checkpoints_.insert(point["model"]);
    points_.push_back(std::move(point));
  }

  /// The report of a run, null where it was removed. What is behind a name is looked for in the sweep alone.
  static json read_run(const fs::path& directory, const std::string& name) {
    const fs::path path = directory / fs::path(name).filename();
    if (!fs::is_regular_file(path)) return nullptr;
    const std::string text = read_text(path);
    try {
      json run = parse_json(text);
      check_report(run);
      return run;
    } catch (const json::exception& error) {
      fail(ErrorCode::kCorrupt, "{}: not a report of 'stbllm quantize --report' ({})", path.string(),
           error.what());
    }
  }

  /// The model behind --kl of an evaluation.
  static std::string name_of_reference(const json& options, size_t evaluation) {
    const auto arguments = options.at("eval").at(evaluation).get<std::vector<std::string>>();
    const auto found = std::ranges::find(arguments, "--kl");
    return found == arguments.end() || found + 1 == arguments.end() ? "reference" : last_name(found[1]);
  }

  size_t index_of(const Text& text) {
    const auto found = std::ranges::find(texts_, text);
    if (found == texts_.end()) return texts_.push_back(text), texts_.size() - 1;
    return static_cast<size_t>(found - texts_.begin());
  }

  std::vector<Text> texts_;
  std::set<std::string> checkpoints_;
  json points_ = json::array(), levels_ = json::array();
};

// --- CSV ------------------------------------------------------------------------------------------------

/// The fields of a line. A field in double quotes may hold commas, and quotes when they are doubled. Nothing
/// where a quote is not closed.
std::optional<std::vector<std::string>> csv_fields(std::string_view line) {
  std::vector<std::string> fields(1);
  bool quoted = false;
  for (size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (c == '"') {
      if (quoted && i + 1 < line.size() && line[i + 1] == '"')
        fields.back() += line[i++];
      else
        quoted = !quoted;
    } else if (c == ',' && !quoted) {
      fields.emplace_back();
    } else {
      fields.back() += c;
    }
  }
  if (quoted) return std::nullopt;
  for (std::string& field : fields) {
    const size_t first = field.find_first_not_of(" \t\r"), last = field.find_last_not_of(" \t\r");
    field = first == std::string::npos ? "" : field.substr(first, last - first + 1);
  }
  return fields;
}

constexpr std::string_view kColumns[] = {"tool",       "label",          "bits", "file_bytes",
                                         "perplexity", "standard_error", "text"};

/// A row of a CSV file by column.
class Row {
 public:
  Row(const std::vector<std::string>& columns, const std::vector<std::string>& fields, std::string where)
      : where_(std::move(where)) {
    if (fields.size() != columns.size())
      fail(ErrorCode::kCorrupt, "{}: expected {} fields as in the first line, found {}", where_,
           columns.size(), fields.size());
    for (size_t i = 0; i < columns.size(); ++i) fields_[columns[i]] = fields[i];
  }

  std::string text(const std::string& column) const {
    const auto found = fields_.find(column);
    return found == fields_.end() ? "" : found->second;
  }
  /// Null for an empty field. Throws Error(kCorrupt) for what is no number above zero, or not finite.
  json number(const std::string& column) const {
    const std::string field = text(column);
    if (field.empty()) return {};
    double value = 0;
    const auto [end, error] = std::from_chars(field.data(), field.data() + field.size(), value);
    if (error != std::errc() || end != field.data() + field.size() || !std::isfinite(value) || value <= 0)
      fail(ErrorCode::kCorrupt, "{}: {}: expected a number above 0, found '{}'", where_, column, field);
    return value;
  }
  const std::string& where() const { return where_; }

 private:
  std::string where_;
  std::map<std::string, std::string> fields_;
};

void add_row(const Row& row, const std::vector<std::string>& texts, Sweep& sweep) {
  const json perplexity = row.number("perplexity"), bits = row.number("bits"),
             size = row.number("file_bytes");
  if (perplexity.is_null() || row.text("tool").empty())
    fail(ErrorCode::kCorrupt, "{}: expected a tool and a perplexity", row.where());
  size_t text = 0;
  if (const std::string name = row.text("text"); !name.empty()) {
    text = static_cast<size_t>(std::ranges::find(texts, name) - texts.begin());
    if (text == texts.size())
      fail(ErrorCode::kCorrupt, "{}: text: expected one of the sweep's ({}), found '{}'", row.where(),
           fmt::join(texts, "; "), name);
  }
  if (bits.is_null() && size.is_null()) {
    const std::string label = row.text("tool") + (row.text("label").empty() ? "" : " ") + row.text("label");
    sweep.add_level({{"label", label}, {"text", text}, {"perplexity", perplexity}});
    return;
  }
  sweep.add_point_of_tool({{"tool", row.text("tool")},
                           {"model", ""},
                           {"label", row.text("label")},
                           {"bits", bits},
                           {"nominal_bits", nullptr},
                           {"file_bytes", size},
                           {"flipped_signs", nullptr},
                           {"seconds", nullptr},
                           {"peak_memory_bytes", nullptr},
                           {"run", nullptr},
                           {"results",
                            {{{"text", text},
                              {"perplexity", perplexity},
                              {"standard_error", row.number("standard_error")},
                              {"kl", nullptr}}}}});
}

void add_csv(const std::string& path, Sweep& sweep) {
  const std::string content = read_text(path);
  const std::vector<std::string> texts = sweep.text_names();
  std::vector<std::string> columns;
  int number = 0;
  for (size_t begin = 0; begin < content.size();) {
    const size_t end = std::min(content.find('\n', begin), content.size());
    const std::string_view line = std::string_view(content).substr(begin, end - begin);
    begin = end + 1;
    const std::string where = fmt::format("{}:{}", path, ++number);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) continue;
    const auto fields = csv_fields(line);
    if (!fields) fail(ErrorCode::kCorrupt, "{}: a quote is not closed", where);
    if (!columns.empty()) {
      add_row(Row(columns, *fields, where), texts, sweep);
      continue;
    }
    columns = *fields;
    for (const std::string& column : columns)
      if (std::ranges::find(kColumns, column) == std::end(kColumns))
        fail(ErrorCode::kCorrupt, "{}: expected columns among {}, found '{}'", where,
             fmt::join(kColumns, ", "), column);
  }
}

}  // namespace

json read_sweeps(const std::vector<std::string>& directories, const std::string& other) {
  Sweep sweep;
  for (const std::string& directory : directories) sweep.add(directory);
  if (!other.empty()) add_csv(other, sweep);
  return sweep.to_json();
}

}  // namespace stbllm
