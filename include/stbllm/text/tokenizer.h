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

  /// Loads the tokenizer of a checkpoint directory: tokenizer.json, else tokenizer.model, else vocab.json +
  /// merges.txt; BOS rules from tokenizer_config.json where tokenizer.json does not state them (has no
  /// post_processor). Throws Error(kNotFound) when none is there, Error(kUnsupported) naming the component
  /// that is not implemented, Error(kCorrupt) for damaged files.
  static std::unique_ptr<Tokenizer> load(const std::filesystem::path& directory);
  /// The same from the bytes that serialize() returned.
  static std::unique_ptr<Tokenizer> from_serialized(const std::string& serialized);

  /// The files that define this tokenizer, as one string (a JSON object of file name -> content), to be kept
  /// in a packed file. The bytes of tokenizer.model, which is binary, stand there as U+0000 to U+00FF.
  virtual std::string serialize() const = 0;

  /// Ids of UTF-8 `text` (Error(kCorrupt) when it is not) of up to 1 GiB. With `add_special_tokens` BOS is
  /// added as HF applies it (once, where the tokenizer adds it).
  virtual std::vector<int32_t> encode(std::string_view text, bool add_special_tokens = true) const = 0;
  /// Text of `ids`; special tokens and ids out of range are left out. Always valid UTF-8: an incomplete
  /// character, as at the end of ids that arrive one by one, becomes U+FFFD.
  virtual std::string decode(std::span<const int32_t> ids) const = 0;
  /// One more than the largest id, added tokens included.
  virtual int64_t vocab_size() const = 0;
  /// -1 when there is none.
  virtual int32_t bos_id() const = 0;
  virtual int32_t eos_id() const = 0;
};

}  // namespace stbllm
