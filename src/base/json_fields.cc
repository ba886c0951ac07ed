#include "stbllm/base/json_fields.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "stbllm/base/error.h"

namespace stbllm {

using nlohmann::json;

namespace {

/// A value as a message shows it: the start of a long one.
std::string shown(const json& value) {
  constexpr size_t kLongest = 100;
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  if (text.size() > kLongest) text.replace(kLongest, std::string::npos, "...");
  return text;
}

}  // namespace

std::optional<int64_t> integer_of(const json& value) {
  if (value.is_number_unsigned() && !std::in_range<int64_t>(value.get<uint64_t>())) return std::nullopt;
  return value.is_number_integer() ? std::optional(value.get<int64_t>()) : std::nullopt;
}

JsonFields::JsonFields(const json& object, std::string where) : object_(object), where_(std::move(where)) {
  if (!object.is_object())
    fail(ErrorCode::kCorrupt, "{}expected an object, found {}", where_, object.type_name());
}

bool JsonFields::mentions(std::string_view key) const { return object_.contains(std::string(key)); }

bool JsonFields::has(std::string_view key) const {
  const auto found = object_.find(std::string(key));
  return found != object_.end() && !found->is_null();
}

const json& JsonFields::at(std::string_view key) const {
  if (!has(key)) fail(ErrorCode::kCorrupt, "{}{} is missing", where_, key);
  return object_.at(std::string(key));
}

int64_t JsonFields::integer(std::string_view key, int64_t lowest, int64_t highest) const {
  const std::optional<int64_t> value = integer_of(at(key));
  if (!value || *value < lowest || *value > highest)
    expected(key, fmt::format("an integer from {} to {}", lowest, highest));
  return *value;
}

int64_t JsonFields::count(std::string_view key) const { return integer(key, 1, int64_t{1} << 30); }

int64_t JsonFields::count(std::string_view key, int64_t fallback) const {
  return has(key) ? count(key) : fallback;
}

double JsonFields::positive(std::string_view key) const {
  const json& value = at(key);
  if (!value.is_number() || !(value.get<double>() > 0)) expected(key, "a number above 0");
  return value.get<double>();
}

double JsonFields::positive(std::string_view key, double fallback) const {
  return has(key) ? positive(key) : fallback;
}

bool JsonFields::flag(std::string_view key, bool fallback) const {
  if (!has(key)) return fallback;
  const json& value = at(key);
  if (!value.is_boolean()) expected(key, "true or false");
  return value.get<bool>();
}

std::string JsonFields::text(std::string_view key, const std::string& fallback) const {
  if (!has(key)) return fallback;
  const json& value = at(key);
  if (!value.is_string()) expected(key, "a string");
  return value.get<std::string>();
}

const json& JsonFields::object(std::string_view key) const {
  const json& value = at(key);
  if (!value.is_object()) expected(key, "an object");
  return value;
}

std::vector<int32_t> JsonFields::ids(std::string_view key) const {
  if (!has(key)) return {};
  const json& value = at(key);
  std::vector<int32_t> result;
  for (const json& id : value.is_array() ? value : json::array({value})) {
    const std::optional<int64_t> number = integer_of(id);
    if (!number || !std::in_range<int32_t>(*number)) expected(key, "a token id or a list of them");
    result.push_back(static_cast<int32_t>(*number));
  }
  return result;
}

void JsonFields::refuse(std::string_view key, std::string_view known) const {
  fail(ErrorCode::kUnsupported, "{}{} = {} is not supported; this program knows {}", where_, key,
       shown(at(key)), known);
}

void JsonFields::expect_size(size_t members) const {
  if (object_.size() != members)
    fail(ErrorCode::kCorrupt, "{}expected {} fields, found {}", where_, members, object_.size());
}

void JsonFields::expected(std::string_view key, std::string_view what) const {
  fail(ErrorCode::kCorrupt, "{}{} = {} must be {}", where_, key, shown(at(key)), what);
}

}  // namespace stbllm
