#include "gguf_tokenizer.h"

#include <nlohmann/json.hpp>
#include <unordered_map>

#include "stbllm/base/error.h"
#include "stbllm/text/tokenizer_json.h"

namespace stbllm {
namespace {

using nlohmann::json;

/// llama.cpp's types of tokens.
enum TokenType : int32_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

/// The name that llama.cpp has for a cut into words, of which it knows the regular expressions by name. Those
/// that PreTokenizer knows differ in these places.
std::string word_pattern(const json& pre_tokenizer) {
  bool digits = false, byte_level = false;
  std::string name, regex;
  for_each_component(pre_tokenizer, "pretokenizers", [&](const json& step) {
    const std::string type = component_type(step);
    digits |= type == "Digits" && step.value("individual_digits", false);
    byte_level |= type == "ByteLevel";
    if (type == "Split") regex = step.at("pattern").value("Regex", "");
  });
  if (!byte_level) return "";
  if (!regex.empty()) {
    if (digits) return "";
    return !regex.starts_with("(?i:")                 ? "gpt-2"
           : regex.find("{1,3}") != std::string::npos ? "llama-bpe"
                                                      : "qwen2";
  }
  return digits ? "smollm" : "gpt-2";
}

/// SentencePiece merges the pair whose result has the highest score: minus the rank of the first merge that
/// makes it.
std::vector<float> scores_of(const json& merges, const std::vector<std::string>& tokens) {
  std::unordered_map<std::string, float> ranks;
  float rank = 0;
  for (const json& merge : merges) {
    const auto [left, right] = parse_merge(merge);
    ranks.try_emplace(left + right, --rank);
  }
  std::vector<float> scores;
  for (const std::string& token : tokens) {
    const auto found = ranks.find(token);
    scores.push_back(found != ranks.end() ? found->second : --rank);
  }
  return scores;
}

/// Whether a text gets a space in front of it.
bool adds_space(const json& definition) {
  bool adds = false;
  for_each_component(component_of(definition, "normalizer"), "normalizers",
                     [&](const json& step) { adds |= component_type(step) == "Prepend"; });
  for_each_component(component_of(definition, "pre_tokenizer"), "pretokenizers", [&](const json& step) {
    if (component_type(step) != "Metaspace") return;
    adds |= step.contains("prepend_scheme") ? step["prepend_scheme"] != "never"
                                            : step.value("add_prefix_space", true);
  });
  return adds;
}

}  // namespace

void add_tokenizer(GgufWriter& file, const Tokenizer& tokenizer, int64_t vocab) {
  const json definition = tokenizer.definition();
  const json& model = definition.at("model");
  const bool sentencepiece = model.value("byte_fallback", false);
  const std::string pattern =
      sentencepiece ? "default" : word_pattern(component_of(definition, "pre_tokenizer"));
  if (pattern.empty())
    fail(ErrorCode::kUnsupported,
         "the tokenizer cuts texts into words in a way that llama.cpp has no name for; export to hf instead");
  if (tokenizer.vocab_size() > vocab)
    fail(ErrorCode::kMismatch, "the tokenizer has {} tokens, but the embedding has {} rows",
         tokenizer.vocab_size(), vocab);

  std::vector<std::string> tokens = tokenizer.tokens();
  std::vector<int32_t> types(tokens.size(), kNormal);
  const json unknown = model.contains("unk_token") ? model["unk_token"] : json();
  for (size_t id = 0; id < tokens.size(); ++id) {
    const std::string& token = tokens[id];
    if (token.empty()) types[id] = kUnused;
    if (sentencepiece && token.size() == 6 && token.starts_with("<0x")) types[id] = kByte;
    if (unknown.is_string() && token == unknown.get<std::string>()) types[id] = kUnknown;
  }
  for (const auto& [content, token] : tokenizer.added_tokens()) {
    const auto id = static_cast<size_t>(token.id);
    tokens[id] = content;
    if (types[id] != kUnknown) types[id] = token.special ? kControl : kUserDefined;
  }
  types.resize(static_cast<size_t>(vocab), kUnused);
  for (int64_t id = 0; id < vocab; ++id) {
    if (id >= std::ssize(tokens)) tokens.emplace_back();
    if (tokens[id].empty()) tokens[id] = fmt::format("[PAD{}]", id);
  }

  file.set("tokenizer.ggml.model", sentencepiece ? "llama" : "gpt2");
  file.set("tokenizer.ggml.pre", pattern);
  file.set("tokenizer.ggml.tokens", tokens);
  file.set("tokenizer.ggml.token_type", types);
  if (sentencepiece) {
    file.set("tokenizer.ggml.scores", scores_of(model.at("merges"), tokens));
    file.set("tokenizer.ggml.add_space_prefix", adds_space(definition));
  } else {
    std::vector<std::string> merges;
    for (const json& merge : model.at("merges")) {
      const auto [left, right] = parse_merge(merge);
      merges.push_back(left + " " + right);
    }
    file.set("tokenizer.ggml.merges", merges);
  }
  const std::span<const int32_t> prefix = tokenizer.prefix();
  if (!prefix.empty()) file.set("tokenizer.ggml.bos_token_id", static_cast<uint32_t>(prefix.front()));
  file.set("tokenizer.ggml.add_bos_token", !prefix.empty());
  if (tokenizer.eos_id() >= 0)
    file.set("tokenizer.ggml.eos_token_id", static_cast<uint32_t>(tokenizer.eos_id()));
}

}  // namespace stbllm
