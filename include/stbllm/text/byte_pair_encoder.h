#pragma once
// The "model" of tokenizer.json, type BPE: a vocabulary, and merges of neighbouring tokens in order of rank.

#include <cstdint>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace stbllm {

/// A hash of strings by which a string_view can be looked up as well.
struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
};
using Vocabulary = std::unordered_map<std::string, int32_t, StringHash, std::equal_to<>>;

class BytePairEncoder {
 public:
  /// Throws Error(kUnsupported) for another type or an option that is not implemented, Error(kCorrupt) for
  /// merges of tokens that the vocabulary lacks and for ids out of range.
  explicit BytePairEncoder(const nlohmann::json& model);

  const Vocabulary& vocabulary() const { return vocabulary_; }
  /// Appends the ids of each word. A word starts as its characters; then the merge of lowest rank is applied,
  /// the leftmost one first, until none is left. That takes O(n log n) for n characters. A character that is
  /// not in the vocabulary becomes the tokens of its bytes ("<0xHH>"), else the unknown token; a vocabulary
  /// without those drops it, as HuggingFace does.
  void encode(std::span<const std::string> words, std::vector<int32_t>& ids) const;

 private:
  /// A doubly linked list in an array: merging two tokens unlinks the right one.
  struct Symbol {
    int32_t id;  // -1 when it is unlinked
    int32_t previous, next;
  };
  struct Merge {
    uint32_t rank;
    int32_t id;
  };

  int32_t find(std::string_view token) const;
  const Merge* find_merge(int32_t left, int32_t right) const;
  void append_characters(std::string_view word, std::vector<Symbol>& symbols) const;
  void merge(std::vector<Symbol>& symbols) const;

  Vocabulary vocabulary_;
  std::unordered_map<uint64_t, Merge> merges_;  // key: left id, right id
  std::vector<int32_t> byte_ids_;  // of "<0x00>"...; empty without byte fallback, -1: not in the vocabulary
  int32_t unknown_id_ = -1;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
};

}  // namespace stbllm
