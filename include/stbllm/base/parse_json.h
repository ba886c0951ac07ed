#pragma once
// JSON that came from outside.

#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace stbllm {

/// The value of `text`. Throws nlohmann::json::exception when it is no JSON, Error(kCorrupt) when arrays and
/// objects are nested more than 64 deep: whoever copies, compares or writes a value needs stack for each.
nlohmann::json parse_json(std::string_view text);

/// The same; a discarded value takes the place of both exceptions.
nlohmann::json try_parse_json(std::string_view text);

}  // namespace stbllm
