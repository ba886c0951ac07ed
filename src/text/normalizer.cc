#include "stbllm/text/normalizer.h"

#include <utility>
#include <vector>

#include "stbllm/text/tokenizer_json.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

Normalizer parse_step(const nlohmann::json& spec) {
  const std::string type = component_type(spec);
  if (type == "Prepend") {
    return [prefix = spec.at("prepend").get<std::string>()](std::string& text) {
      if (!text.empty()) text.insert(0, prefix);
    };
  }
  if (type == "Replace") {
    const nlohmann::json& pattern = spec.at("pattern");
    if (!pattern.contains("String")) {
      fail(ErrorCode::kUnsupported, "normalizer Replace with a regular expression is not implemented: {}",
           pattern.at("Regex").get<std::string>());
    }
    auto from = pattern.at("String").get<std::string>();
    if (from.empty()) fail(ErrorCode::kCorrupt, "normalizer Replace has an empty pattern");
    return [from = std::move(from), to = spec.at("content").get<std::string>()](std::string& text) {
      replace_all(text, from, to);
    };
  }
  if (type == "NFC") {
    return [](std::string& text) { text = normalize_nfc(text); };
  }
  fail(ErrorCode::kUnsupported,
       "normalizer \"{}\" is not implemented (these are: Sequence, Prepend, Replace, NFC)", type);
}

}  // namespace

Normalizer parse_normalizer(const nlohmann::json& spec) {
  std::vector<Normalizer> steps;
  for_each_component(spec, "normalizers",
                     [&](const nlohmann::json& step) { steps.push_back(parse_step(step)); });
  return [steps = std::move(steps)](std::string& text) {
    const size_t before = text.size();
    for (const Normalizer& step : steps) {
      step(text);
      check_growth(before, text.size());
    }
  };
}

void replace_all(std::string& text, const std::string& pattern, const std::string& content) {
  std::string result;
  size_t begin = 0;
  for (size_t hit; (hit = text.find(pattern, begin)) != std::string::npos; begin = hit + pattern.size()) {
    result.append(text, begin, hit - begin).append(content);
    check_growth(text.size(), result.size());
  }
  if (begin == 0) return;
  text = result.append(text, begin);
}

}  // namespace stbllm
