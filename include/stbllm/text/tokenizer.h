#pragma once
// HuggingFace tokenizers: byte-level BPE and SentencePiece-style BPE with byte fallback. No torch here.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// Loads the tokenizer of a checkpoint directory: tokenizer.json, else tokenizer.model, else vocab.json + merges.txt;
  /// BOS rules from tokenizer_config.json where tokenizer.json does not state them.
  /// Throws Error(kNotFound) when none is there, Error(kUnsupported) naming the component that is not implemented.
  static std::unique_ptr<Tokenizer> load(const std::filesystem::path& directory);
  /// The same from the bytes that serialize() returned.
  static std::unique_ptr<Tokenizer> from_serialized(const std::string& serialized);

  /// The files that define this tokenizer, as one string (a JSON object of file name -> content), to be kept in a packed file.
  virtual std::string serialize() const = 0;

  /// Ids of UTF-8 `text`. With `add_special_tokens` BOS is added as HF applies it (once, where the tokenizer adds it).
  virtual std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const = 0;
  /// Text of `ids`; special tokens are left out.
  virtual std::string decode(std::span<const int32_t> ids) const = 0;
  /// Number of ids, added tokens included.
  virtual int64_t vocab_size() const = 0;
  /// -1 when there is none.
  virtual int32_t bos_id() const = 0;
  virtual int32_t eos_id() const = 0;
};

}  // namespace stbllm
