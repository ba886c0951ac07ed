#pragma once
// Pieces of tokenizer.json that its parts have in common.

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"

namespace stbllm {

/// A token id. Throws Error(kCorrupt) unless it is an integer that is not negative and not absurdly large: a
/// damaged id must not ask for gigabytes.
inline int32_t parse_id(const nlohmann::json& value) {
  constexpr int64_t kEnd = int64_t{1} << 24;
  const int64_t id = integer_of(value).value_or(-1);
  if (id < 0 || id >= kEnd) {
    fail(ErrorCode::kCorrupt, "expected an id from 0 to {}, found {}", kEnd - 1,
         value.is_number() ? value.dump() : value.type_name());
  }
  return static_cast<int32_t>(id);
}

/// Steps of a tokenizer may make several bytes of one, and a chain of such steps in a stranger's file could
/// fill the memory. Throws Error(kUnsupported) when `before` bytes have become more than real ones make.
inline void check_growth(size_t before, size_t after) {
  constexpr size_t kMostOfOneByte = 32, kMostAdded = 64;
  if (after > kMostOfOneByte * before + kMostAdded)
    fail(ErrorCode::kUnsupported, "the steps of the tokenizer make more than {} bytes of {}",
         kMostOfOneByte * before + kMostAdded, before);
}

/// Of all strings together.
inline size_t total_bytes(const std::vector<std::string>& strings) {
  size_t total = 0;
  for (const std::string& string : strings) total += string.size();
  return total;
}

/// The "type" of a component of tokenizer.json.
inline std::string component_type(const nlohmann::json& component) {
  return component.at("type").get<std::string>();
}

/// The component `name` of a definition, null where it has none.
inline nlohmann::json component_of(const nlohmann::json& definition, const char* name) {
  return definition.contains(name) ? definition[name] : nlohmann::json();
}

/// The two tokens of a merge, which is written as "a b" or as ["a", "b"]. Throws Error(kCorrupt) for another
/// text.
std::pair<std::string, std::string> parse_merge(const nlohmann::json& merge);

/// Calls visit(component) for the component, or for each member when it is a Sequence (`list` names the
/// members).
template <typename Visit>
void for_each_component(const nlohmann::json& component, const char* list, Visit visit) {
  if (component.is_null()) return;
  if (component_type(component) != "Sequence") {
    visit(component);
    return;
  }
  for (const nlohmann::json& member : component.at(list)) {
    if (component_type(member) == "Sequence") {
      fail(ErrorCode::kUnsupported, "a Sequence inside a Sequence in \"{}\" is not implemented", list);
    }
    visit(member);
  }
}

}  // namespace stbllm
