#pragma once
// Tokenizers small enough to follow by hand, in the form of tokenizer.json.

#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "stbllm/text/tokenizer.h"

namespace stbllm::test {

inline const std::string kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline const std::string kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3})"
    R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline const std::string kQwen2Pattern = R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})"
                                         R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// A Split pre-tokenizer by `pattern`.
inline nlohmann::json split_by(const std::string& pattern) {
  return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
}

/// The symbols of the 256 bytes: ! to ~, U+00A1 to U+00AC and U+00AE to U+00FF stand for themselves, the
/// others are U+0100, U+0101, ... in order.
inline std::vector<std::string> byte_alphabet() {
  const auto two_bytes = [](int code) {
    return std::string{static_cast<char>(0xc0 + code / 64), static_cast<char>(0x80 + code % 64)};
  };
  std::vector<std::string> symbols;
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    if (byte > ' ' && byte < 0x7f) {
      symbols.push_back(std::string(1, static_cast<char>(byte)));
    } else {
      symbols.push_back(two_bytes(byte > 0xa0 && byte != 0xad ? byte : next++));
    }
  }
  return symbols;
}

/// Byte-level BPE: ids 0 to 255 are the bytes, 256 to 268 the merges.
inline nlohmann::json byte_level_tokenizer() {
  nlohmann::json vocab, merges = nlohmann::json::array();
  for (const std::string& symbol : byte_alphabet()) vocab[symbol] = vocab.size();
  const std::pair<const char*, const char*> pairs[] = {
      {"h", "e"}, {"l", "l"},        {"he", "ll"},        {"hell", "o"},       {"\u0120", "w"},
      {"o", "r"}, {"\u0120w", "or"}, {"l", "d"},          {"\u0120wor", "ld"}, {"\u0120", "hello"},
      {"1", "2"}, {"12", "3"},       {"\u00c3", "\u00a9"}};
  for (const auto& [left, right] : pairs) {
    vocab[std::string(left) + right] = vocab.size();
    merges.push_back({left, right});
  }
  const nlohmann::json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  return {{"added_tokens", nlohmann::json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"vocab", vocab},
            {"merges", merges}}}};
}

inline nlohmann::json added_token(int id, const std::string& content,
                                  const std::vector<std::string>& flags = {}) {
  nlohmann::json token = {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
                          {"rstrip", false}, {"normalized", false}, {"special", false}};
  for (const std::string& flag : flags) token[flag] = true;
  return token;
}

/// SentencePiece-style BPE as LLaMA-1/2 have it: ids 3 to 258 are the byte tokens, 259 to 269 characters, 270
/// to 278 the merges.
inline nlohmann::json sentencepiece_tokenizer() {
  nlohmann::json vocab = {{"<unk>", 0}, {"<s>", 1}, {"</s>", 2}}, merges = nlohmann::json::array();
  for (int byte = 0; byte < 256; ++byte) vocab[fmt::format("<0x{:02X}>", byte)] = vocab.size();
  for (const char* character : {"\u2581", "a", "b", "c", "d", "e", "h", "l", "o", "w", "r"}) {
    vocab[character] = vocab.size();
  }
  const std::pair<const char*, const char*> pairs[] = {
      {"\u2581", "h"},      {"e", "l"}, {"l", "o"},  {"\u2581h", "el"}, {"\u2581hel", "lo"},
      {"\u2581", "\u2581"}, {"a", "b"}, {"ab", "c"}, {"b", "c"}};
  for (const auto& [left, right] : pairs) {
    vocab[std::string(left) + right] = vocab.size();
    merges.push_back(std::string(left) + " " + right);
  }
  return {{"added_tokens",
           {added_token(0, "<unk>", {"special"}), added_token(1, "<s>", {"special"}),
            added_token(2, "</s>", {"special"})}},
          {"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "\u2581"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}}}}}},
          {"pre_tokenizer", nullptr},
          {"post_processor",
           {{"type", "TemplateProcessing"},
            {"single",
             {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
              {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
            {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {1}}, {"tokens", {"<s>"}}}}}}}},
          {"decoder",
           {{"type", "Sequence"},
            {"decoders",
             {{{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}},
              {{"type", "ByteFallback"}},
              {{"type", "Fuse"}},
              {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
          {"model",
           {{"type", "BPE"},
            {"unk_token", "<unk>"},
            {"fuse_unk", true},
            {"byte_fallback", true},
            {"vocab", vocab},
            {"merges", merges}}}};
}

/// The tokenizer of these files: name -> JSON, or a string for a file that is not JSON.
inline std::unique_ptr<Tokenizer> tokenizer_of(const nlohmann::json& files) {
  nlohmann::json contents = nlohmann::json::object();
  for (const auto& [name, content] : files.items()) {
    contents[name] = content.is_string() ? content.get<std::string>() : content.dump();
  }
  return Tokenizer::from_serialized(contents.dump());
}

}  // namespace stbllm::test
