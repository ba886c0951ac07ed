#pragma once
// Typed reads of the members of a JSON object that came from outside.

#include <concepts>
#include <cstdint>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

/// The value where it is an integer of 64 bits with a sign. nlohmann's own conversions round fractions, wrap
/// larger integers around, and are undefined for larger numbers of other kinds.
std::optional<int64_t> integer_of(const nlohmann::json& value);

/// A member that is null counts as absent, as HuggingFace writes it. A read without a fallback throws
/// Error(kCorrupt) when the member is absent, and every read does when it has another type or is out of
/// range; messages name the key, what was expected and what was found. The object must outlive this.
class JsonFields {
 public:
  /// `where` stands before the key in messages: "config.json: ", "config.json: rope_scaling.". Throws
  /// Error(kCorrupt) unless `object` is an object.
  explicit JsonFields(const nlohmann::json& object, std::string where = "");

  /// Whether the key is there, be it with null.
  bool mentions(std::string_view key) const;
  bool has(std::string_view key) const;
  const nlohmann::json& at(std::string_view key) const;

  /// An integer from 0 to the largest one of its type.
  template <std::integral Integer>
  Integer integer(std::string_view key) const {
    return static_cast<Integer>(integer(key, 0, std::numeric_limits<Integer>::max()));
  }
  /// An integer from 1 to 2^30: larger sizes mean a damaged file, and products of two do not overflow.
  int64_t count(std::string_view key) const;
  int64_t count(std::string_view key, int64_t fallback) const;
  /// A number above 0.
  double positive(std::string_view key) const;
  double positive(std::string_view key, double fallback) const;
  bool flag(std::string_view key, bool fallback) const;
  std::string text(std::string_view key, const std::string& fallback) const;
  const nlohmann::json& object(std::string_view key) const;
  /// Token ids: one, several in an array, or none when the member is absent.
  std::vector<int32_t> ids(std::string_view key) const;

  /// Throws Error(kUnsupported): the value of `key` is none of those that are `known`.
  [[noreturn]] void refuse(std::string_view key, std::string_view known) const;
  /// Throws Error(kCorrupt) unless the object has this many members.
  void expect_size(size_t members) const;

 private:
  int64_t integer(std::string_view key, int64_t lowest, int64_t highest) const;
  [[noreturn]] void expected(std::string_view key, std::string_view what) const;

  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace stbllm
