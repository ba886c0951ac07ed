#include "command_tree.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>

namespace stbllm {
namespace {

/// The names between the braces of "TEXT:{fast,default,best}", as CLI::IsMember and suggest() describe them.
std::vector<std::string> listed_values(const std::string& type) {
  const size_t open = type.find('{'), close = type.find('}');
  if (open == std::string::npos || close == std::string::npos || close < open) return {};
  return CLI::detail::split(type.substr(open + 1, close - open - 1), ',');
}

OptionFacts facts_of(const CLI::Option& option) {
  OptionFacts facts;
  for (const std::string& name : option.get_snames()) facts.names.push_back("-" + name);
  for (const std::string& name : option.get_lnames()) facts.names.push_back("--" + name);
  if (!option.nonpositional()) facts.positional = option.get_name(/*positional=*/true);
  if (option.get_items_expected_max() > 0) {
    const std::string type = option.get_type_name();
    facts.value = type.substr(0, type.find(':'));
    if (facts.value.empty()) facts.value = "TEXT";
    facts.values = listed_values(type);
    facts.files = facts.value == "TEXT" && (facts.values.empty() || std::erase(facts.values, "FILE") > 0);
  }
  facts.required = option.get_required();
  facts.repeatable = option.get_items_expected_max() > 1;
  facts.standard = option.get_default_str();
  for (const CLI::Option* other : option.get_excludes()) facts.excludes.push_back(other->get_name());
  std::ranges::sort(facts.excludes);  // CLI11 keeps them by address
  facts.description = option.get_description();
  return facts;
}

}  // namespace

std::vector<OptionFacts> options_of(const CLI::App& command) {
  std::vector<OptionFacts> all;
  for (const CLI::Option* option : command.get_options())
    if (!option->get_group().empty()) all.push_back(facts_of(*option));
  std::stable_partition(all.begin(), all.end(),
                        [](const OptionFacts& facts) { return facts.positional.empty(); });
  return all;
}

std::vector<const CLI::App*> subcommands_of(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App* command) { return !command->get_group().empty(); });
}

namespace {

CLI::Validator number_that(bool (*holds)(double), const char* expected, const char* kind) {
  return {[=](std::string& text) {
            double value = 0;
            const bool number = CLI::detail::lexical_cast(text, value);
            return number && holds(value) ? std::string()
                                          : fmt::format("expected a number {}, found {}", expected, text);
          },
          kind};
}

}  // namespace

CLI::Validator above_zero() {
  return number_that([](double x) { return x > 0; }, "above 0", "POSITIVE");
}

CLI::Validator zero_or_more() {
  return number_that([](double x) { return x >= 0; }, "of at least 0", "NONNEGATIVE");
}

CLI::Validator byte_count() {
  return {[](std::string& text) {
            constexpr std::string_view kUnits = "kmgt";
            double number = 0;
            const char* const last = text.data() + text.size();
            const auto [end, fault] = std::from_chars(text.data(), last, number);
            std::string unit = CLI::detail::to_lower(CLI::detail::trim_copy(std::string(end, last)));
            if (unit.ends_with('b')) unit.pop_back();
            const bool binary = unit.size() == 2 && unit.ends_with('i');
            if (binary) unit.pop_back();
            const size_t power = unit.size() == 1 ? kUnits.find(unit) + 1 : 0;  // 0 where it is none of them
            const double bytes = number * std::pow(binary ? 1024.0 : 1000.0, power);
            if (fault != std::errc() || unit.empty() == (power > 0) || !(bytes >= 0 && bytes < 0x1p63))
              return fmt::format("expected bytes like 800M or 1.5G, found {}", text);
            text = std::to_string(std::llround(bytes));
            return std::string();
          },
          "BYTES"};
}

CLI::Validator suggest(const std::vector<std::string>& values) {
  return {[](std::string&) { return std::string(); }, fmt::format("{{{}}}", fmt::join(values, ","))};
}

}  // namespace stbllm
