#pragma once
// HuggingFace tokenizers: byte-level BPE and SentencePiece-style BPE with byte fallback. No torch here.

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/text/added_tokens.h"
#include "stbllm/text/byte_pair_encoder.h"
#include "stbllm/text/normalizer.h"
#include "stbllm/text/pre_tokenizer.h"
#include "stbllm/text/token_decoder.h"

namespace stbllm {

class Tokenizer {
 public:
  /// Loads the tokenizer of a checkpoint directory: tokenizer.json, else tokenizer.model, else vocab.json +
  /// merges.txt; BOS rules from tokenizer_config.json where tokenizer.json does not state them (has no
  /// post_processor). Throws Error(kNotFound) when none is there, Error(kUnsupported) naming the component
  /// that is not implemented, Error(kCorrupt) for damaged files.
  static std::unique_ptr<Tokenizer> load(const std::filesystem::path& directory);
  /// The same from the bytes that serialize() returned.
  static std::unique_ptr<Tokenizer> from_serialized(const std::string& serialized);

  /// The files that define this tokenizer, as one string (a JSON object of file name -> content), to be kept
  /// in a packed file. The bytes of tokenizer.model, which is binary, stand there as U+0000 to U+00FF.
  std::string serialize() const;
  /// What they say in the form of tokenizer.json, whatever the files: its "model" (vocabulary, merges) and
  /// its other components.
  nlohmann::json definition() const;
  /// Those files: name -> content.
  const std::map<std::string, std::string>& files() const { return files_; }

  /// Ids of UTF-8 `text` (Error(kCorrupt) when it is not) of up to 1 GiB (Error(kUnsupported) when it is
  /// longer). With `add_special_tokens` BOS is added as HF applies it (once, where the tokenizer adds it).
  std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const;
  /// Text of `ids`; special tokens and ids out of range are left out. A token with a role (BOS, EOS, padding,
  /// ...) is special whatever its own entry says. Always valid UTF-8: an incomplete character, as at the end
  /// of ids that arrive one by one, becomes U+FFFD.
  std::string decode(std::span<const int32_t> ids) const;
  /// One more than the largest id, added tokens included.
  int64_t vocab_size() const { return std::ssize(tokens_); }
  /// The tokens by id, as the vocabulary writes them; empty where an id has none.
  const std::vector<std::string>& tokens() const { return tokens_; }
  /// Tokens that are cut out of a text before anything else, by content.
  const std::map<std::string, AddedToken>& added_tokens() const { return added_; }
  /// What stands in front of a text with special tokens, BOS as a rule.
  std::span<const int32_t> prefix() const { return prefix_; }
  /// The id that ends a text, -1 when there is none.
  int32_t eos_id() const { return eos_id_; }

 private:
  using Files = std::map<std::string, std::string>;  // file name -> content
  struct Config;

  Tokenizer(Files files, const std::string& origin);
  const char* source() const;
  nlohmann::json define(std::string_view source, const Config& config) const;
  int32_t find(const std::string& content) const;
  void add_token(AddedToken token);
  void make_special(const nlohmann::json& named);
  void add_tokens_of_config(const Config& config);
  bool parse_post_processor(const nlohmann::json& spec);
  void apply_config(const Config& config, std::string_view source);
  void index_tokens();

  Files files_;
  std::optional<BytePairEncoder> encoder_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  TokenDecoder decoder_;
  std::map<std::string, AddedToken> added_;  // by content
  AddedTokenFinder raw_tokens_, normalized_tokens_;
  std::vector<int32_t> prefix_, suffix_;  // special tokens around the text
  bool states_special_tokens_ = false;    // the definition has a post-processor
  std::vector<std::string> tokens_;       // by id
  std::vector<bool> special_;             // by id
  int32_t eos_id_ = -1;
};

}  // namespace stbllm
