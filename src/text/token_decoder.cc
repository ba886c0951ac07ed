#include "stbllm/text/token_decoder.h"

#include <charconv>
#include <unordered_map>
#include <utility>

#include "stbllm/base/json_fields.h"
#include "stbllm/text/normalizer.h"
#include "stbllm/text/pre_tokenizer.h"
#include "stbllm/text/tokenizer_json.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

using Step = std::function<void(std::vector<std::string>& tokens)>;

/// The byte that a symbol of byte_symbols() stands for, or -1 for another character.
int symbol_byte(char32_t symbol) {
  static const auto bytes = [] {
    std::unordered_map<char32_t, int> table;
    for (int byte = 0; byte < 256; ++byte) table[decode_utf8(byte_symbols()[byte], 0).value] = byte;
    return table;
  }();
  const auto it = bytes.find(symbol);
  return it == bytes.end() ? -1 : it->second;
}

/// The bytes of a token of byte symbols; a token with any other character (an added one) stays as it is.
std::string token_bytes(const std::string& token) {
  std::string bytes;
  for (size_t i = 0; i < token.size();) {
    const CodePoint point = decode_utf8(token, i);
    const int byte = symbol_byte(point.value);
    if (byte < 0) return token;
    bytes += static_cast<char>(byte);
    i += point.length;
  }
  return bytes;
}

std::string join(const std::vector<std::string>& tokens, const std::string& separator) {
  std::string text;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) text += separator;
    text += tokens[i];
  }
  return text;
}

void fuse(std::vector<std::string>& tokens) { tokens = {join(tokens, "")}; }

void decode_byte_level(std::vector<std::string>& tokens) {
  for (std::string& token : tokens) token = token_bytes(token);
  fuse(tokens);
  tokens.front() = replace_invalid_utf8(tokens.front());
}

/// The byte of a token "<0xHH>", or -1 for another token.
int fallback_byte(const std::string& token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token.back() != '>') return -1;
  int byte = 0;
  const char* end = token.data() + 5;
  return std::from_chars(token.data() + 3, end, byte, 16).ptr == end && byte >= 0 ? byte : -1;
}

/// A run of byte tokens becomes their text, or one U+FFFD for each when they are not UTF-8 together.
void decode_byte_fallback(std::vector<std::string>& tokens) {
  std::vector<std::string> result;
  std::string bytes;
  const auto flush = [&] {
    if (find_invalid_utf8(bytes) == std::string_view::npos) {
      result.push_back(bytes);
    } else {
      result.insert(result.end(), bytes.size(), "\uFFFD");
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    if (const int byte = fallback_byte(token); byte >= 0) {
      bytes += static_cast<char>(byte);
    } else {
      if (!bytes.empty()) flush();
      result.push_back(std::move(token));
    }
  }
  if (!bytes.empty()) flush();
  tokens = std::move(result);
}

/// Takes up to `start` leading and `stop` trailing copies of `content` off `token`.
void strip(std::string& token, const std::string& content, int64_t start, int64_t stop) {
  for (; start > 0 && token.starts_with(content); --start) token.erase(0, content.size());
  for (; stop > 0 && token.ends_with(content); --stop) token.resize(token.size() - content.size());
}

Step parse_step(const nlohmann::json& spec) {
  const std::string type = component_type(spec);
  if (type == "ByteLevel") return decode_byte_level;
  if (type == "ByteFallback") return decode_byte_fallback;
  if (type == "Fuse") return fuse;
  if (type == "Replace" && spec.at("pattern").contains("String")) {
    auto from = spec.at("pattern").at("String").get<std::string>();
    if (from.empty()) fail(ErrorCode::kCorrupt, "decoder Replace has an empty pattern");
    return [from = std::move(from),
            to = spec.at("content").get<std::string>()](std::vector<std::string>& tokens) {
      for (std::string& token : tokens) replace_all(token, from, to);
    };
  }
  if (type == "Strip") {
    auto content = spec.at("content").get<std::string>();
    if (content.empty()) fail(ErrorCode::kCorrupt, "decoder Strip has an empty content");
    const JsonFields fields(spec, "decoder Strip: ");
    return [content = std::move(content), start = fields.integer<int64_t>("start"),
            stop = fields.integer<int64_t>("stop")](std::vector<std::string>& tokens) {
      for (std::string& token : tokens) strip(token, content, start, stop);
    };
  }
  if (type == "Metaspace") {
    auto mark = spec.at("replacement").get<std::string>();
    if (mark.empty()) fail(ErrorCode::kCorrupt, "decoder Metaspace has an empty replacement");
    const bool prefixed = JsonFields(spec).flag("add_prefix_space", true) &&
                          JsonFields(spec).text("prepend_scheme", "always") != "never";
    return [mark = std::move(mark), prefixed](std::vector<std::string>& tokens) {
      for (size_t i = 0; i < tokens.size(); ++i) replace_all(tokens[i], mark, i == 0 && prefixed ? "" : " ");
    };
  }
  fail(ErrorCode::kUnsupported,
       "decoder \"{}\" is not implemented (these are: Sequence, ByteLevel, Metaspace, Replace of a "
       "string, ByteFallback, Fuse, Strip)",
       type);
}

}  // namespace

TokenDecoder parse_token_decoder(const nlohmann::json& spec) {
  std::vector<Step> steps;
  for_each_component(spec, "decoders",
                     [&](const nlohmann::json& step) { steps.push_back(parse_step(step)); });
  return [steps = std::move(steps), separator = spec.is_null() ? " " : ""](std::vector<std::string> tokens) {
    const size_t before = total_bytes(tokens);
    for (const Step& step : steps) {
      step(tokens);
      check_growth(before, total_bytes(tokens));
    }
    return join(tokens, separator);
  };
}

}  // namespace stbllm
