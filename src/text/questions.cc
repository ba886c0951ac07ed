#include "stbllm/text/questions.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"

namespace stbllm {
namespace {

using Json = nlohmann::json;

/// A line of a file, for messages.
struct Place {
  const std::filesystem::path& path;
  int64_t line;

  template <typename... Args>
  [[noreturn]] void refuse(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) const {
    fail(code, "{}: line {}: {}", path.string(), line, fmt::format(format, std::forward<Args>(args)...));
  }
};

Choice choice_of(const Json& pair, const Place& place) {
  const auto text = [&](size_t index) -> std::string {
    const std::string key = fmt::format("arg_{}", index);
    const Json* value = nullptr;
    if (pair.is_array() && pair.size() == 2) value = &pair[index];
    if (pair.is_object() && pair.size() == 2 && pair.contains(key)) value = &pair[key];
    if (value == nullptr || !value->is_string())
      place.refuse(ErrorCode::kUnsupported,
                   "expected pairs of context and continuation in \"arguments\", found {}", pair.dump());
    return *value;
  };
  return {.context = text(0), .continuation = text(1)};
}

std::vector<Choice> choices_of(const Json& sample, const Place& place) {
  const Json arguments = sample.value("arguments", Json());
  std::vector<Choice> choices;
  if (arguments.is_array())
    for (const Json& pair : arguments) choices.push_back(choice_of(pair, place));
  if (arguments.is_object())  // by number: "gen_args_10" stands before "gen_args_2" in the object
    for (size_t i = 0; i < arguments.size(); ++i) {
      const std::string key = fmt::format("gen_args_{}", i);
      if (!arguments.contains(key))
        place.refuse(ErrorCode::kCorrupt, "\"arguments\" has {} entries but no \"{}\"", arguments.size(),
                     key);
      choices.push_back(choice_of(arguments[key], place));
    }
  if (choices.size() < 2)
    place.refuse(ErrorCode::kUnsupported,
                 "expected \"arguments\" with two or more choices, found {}; tasks of another kind than "
                 "multiple choice cannot be judged",
                 choices.size());
  for (const Choice& choice : choices)
    if (choice.continuation.empty()) place.refuse(ErrorCode::kCorrupt, "a choice is empty");
  return choices;
}

std::optional<int64_t> number_of(const Json& value) {
  if (value.is_number()) return integer_of(value);
  if (!value.is_string()) return std::nullopt;
  const auto& text = value.get_ref<const std::string&>();
  int64_t number = 0;
  const auto [end, fault] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (fault != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

/// The choice that goes on with `text`, with or without the space in front of it.
std::optional<int64_t> choice_with(const std::vector<Choice>& choices, const std::string& text) {
  const auto found = std::ranges::find_if(choices, [&](const Choice& choice) {
    return choice.continuation == text || choice.continuation == " " + text;
  });
  if (found == choices.end()) return std::nullopt;
  return found - choices.begin();
}

std::vector<int64_t> gold_of(const Json& sample, const std::vector<Choice>& choices, const Place& place) {
  const auto checked = [&](int64_t gold) {
    if (gold < 0 || gold >= std::ssize(choices))
      place.refuse(ErrorCode::kCorrupt, "the right choice is {}, expected 0 to {}", gold, choices.size() - 1);
    return gold;
  };
  if (const auto gold = number_of(sample.value("gold", Json()))) return {checked(*gold)};
  const bool alike = std::ranges::all_of(
      choices, [&](const Choice& choice) { return choice.continuation == choices.front().continuation; });
  if (alike) {
    const Json doc = sample.value("doc", Json());
    if (const auto answer = doc.is_object() ? number_of(doc.value("answer", Json())) : std::nullopt)
      return {checked(*answer - 1)};
    place.refuse(ErrorCode::kUnsupported,
                 "all choices go on alike and no \"gold\" or \"doc\".\"answer\" says which is right");
  }
  Json target = sample.value("target", Json());
  if (const auto gold = number_of(target)) return {checked(*gold)};
  if (target.is_string()) {
    if (const auto gold = choice_with(choices, target)) return {*gold};
    target = try_parse_json(target.get<std::string>());
  }
  std::vector<int64_t> all;
  if (target.is_array())
    for (const Json& one : target)
      if (const auto gold = number_of(one)) all.push_back(checked(*gold));
  if (all.empty())
    place.refuse(ErrorCode::kUnsupported,
                 "\"target\" is neither the number of a choice nor its text; add \"gold\"");
  return all;
}

/// samples_NAME_2026-11-30T07-12-00.123456.jsonl -> NAME.
std::string task_of(const std::filesystem::path& path) {
  std::string name = path.stem().string();
  if (!name.starts_with("samples_")) return name;
  name.erase(0, std::string_view("samples_").size());
  const size_t date = name.rfind('_');
  const bool dated = date != std::string::npos && date > 0 && name.find('T', date) != std::string::npos;
  return dated ? name.substr(0, date) : name;
}

}  // namespace

QuestionSet read_questions(const std::filesystem::path& path, int64_t limit) {
  QuestionSet set{.task = task_of(path), .questions = {}};
  std::istringstream lines(read_text(path));
  int64_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const Place place{path, ++number};
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (limit > 0 && std::ssize(set.questions) == limit) break;
    const Json sample = try_parse_json(line);
    if (!sample.is_object()) place.refuse(ErrorCode::kCorrupt, "expected a JSON object");
    if (sample.contains("task") && sample["task"].is_string()) {
      const std::string task = sample["task"];
      if (set.questions.empty())
        set.task = task;
      else if (task != set.task)
        place.refuse(ErrorCode::kUnsupported,
                     "a question of task {} behind those of {}; give each task a file", task, set.task);
    }
    if (sample.contains("acc_mutual_info"))
      place.refuse(ErrorCode::kUnsupported,
                   "the requests of acc_mutual_info come with unconditional ones; log the task without it");
    Question question{.choices = choices_of(sample, place), .gold = {}};
    question.gold = gold_of(sample, question.choices, place);
    set.questions.push_back(std::move(question));
  }
  if (set.questions.empty())
    fail(ErrorCode::kTooLittleText, "{}: holds no question; expected one JSON object per line",
         path.string());
  return set;
}

}  // namespace stbllm
