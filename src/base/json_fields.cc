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
  const json& value = at(key);
  // An unsigned number above 2^63 would look negative as a signed one.
  const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= static_cast<uint64_t>(highest)
                                               : value.is_number_integer() && value.get<int64_t>() <= highest;
  if (!fits || value.get<int64_t>() < lowest)
    expected(key, fmt::format("an integer from {} to {}", lowest, highest));
  return value.get<int64_t>();
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
    if (!id.is_number_integer() || !std::in_range<int32_t>(id.get<int64_t>()))
      expected(key, "a token id or a list of them");
    result.push_back(id.get<int32_t>());
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
