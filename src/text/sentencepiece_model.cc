// Reads the few fields of sentencepiece_model.proto that define a BPE model:
//   ModelProto     { repeated SentencePiece pieces = 1; TrainerSpec trainer_spec = 2;
//                    NormalizerSpec normalizer_spec = 3; }
//   SentencePiece  { string piece = 1; float score = 2; Type type = 3; }
//   TrainerSpec    { ModelType model_type = 3; string unk_piece = 45; }
//   NormalizerSpec { bytes precompiled_charsmap = 2; bool add_dummy_prefix = 3;
//                    bool remove_extra_whitespaces = 4; }

#include "stbllm/text/sentencepiece_model.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>
#include <tuple>
#include <vector>

#include "stbllm/base/error.h"
#include "stbllm/text/byte_pair_encoder.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

using nlohmann::json;

enum PieceType : uint64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4 };
constexpr uint64_t kBpe = 2;

struct Piece {
  std::string text;
  float score = 0;
  uint64_t type = kNormal;
};

struct Model {
  std::vector<Piece> pieces;
  uint64_t model_type = 1;  // unigram, unless the file says otherwise
  std::string unknown_piece = "<unk>";
  bool has_charsmap = false;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
};

/// The fields of one message, in order.
class MessageReader {
 public:
  explicit MessageReader(std::string_view bytes) : rest_(bytes) {}

  /// Moves to the next field; false at the end of the message.
  bool next() {
    if (rest_.empty()) return false;
    const uint64_t tag = varint();
    number_ = tag / 8;
    wire_type_ = tag % 8;
    switch (wire_type_) {
      case 0:
        value_ = varint();
        break;
      case 1:
        bytes_ = take(8);
        break;
      case 2:
        bytes_ = take(varint());
        break;
      case 5:
        bytes_ = take(4);
        break;
      default:
        fail(ErrorCode::kCorrupt, "field {} has the unknown wire type {}", number_, wire_type_);
    }
    return true;
  }

  uint64_t number() const { return number_; }
  uint64_t value() const { return expect(0), value_; }
  std::string_view bytes() const { return expect(2), bytes_; }
  float value_as_float() const {
    expect(5);
    uint32_t bits = 0;
    for (int i = 3; i >= 0; --i) bits = bits * 256 + static_cast<uint8_t>(bytes_[i]);
    return std::bit_cast<float>(bits);
  }

 private:
  void expect(uint64_t wire_type) const {
    if (wire_type_ != wire_type) {
      fail(ErrorCode::kCorrupt, "field {} has wire type {}, expected {}", number_, wire_type_, wire_type);
    }
  }

  std::string_view take(uint64_t size) {
    if (size > rest_.size())
      fail(ErrorCode::kCorrupt, "the file ends within field {}: it is truncated", number_);
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  /// Groups of seven bits, least significant first; the top bit of a byte says that more follow.
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<uint8_t>(take(1)[0]);
      value |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) return value;
    }
    fail(ErrorCode::kCorrupt, "field {} has a number of more than 64 bits", number_);
  }

  std::string_view rest_;
  uint64_t number_ = 0, wire_type_ = 0, value_ = 0;
  std::string_view bytes_;
};

Piece parse_piece(std::string_view bytes) {
  Piece piece;
  for (MessageReader field(bytes); field.next();) {
    if (field.number() == 1) piece.text = field.bytes();
    if (field.number() == 2) piece.score = field.value_as_float();
    if (field.number() == 3) piece.type = field.value();
  }
  constexpr size_t kLongest = 1024;  // merges_by_score() tries every place to divide a piece
  if (piece.text.size() > kLongest)
    fail(ErrorCode::kUnsupported, "a piece has {} bytes, at most {} are possible", piece.text.size(),
         kLongest);
  if (piece.text.empty() || find_invalid_utf8(piece.text) != std::string::npos ||
      !std::isfinite(piece.score)) {
    fail(ErrorCode::kCorrupt, "a piece is empty, not UTF-8 or has no finite score");
  }
  return piece;
}

Model parse_model(std::string_view bytes) {
  Model model;
  for (MessageReader field(bytes); field.next();) {
    if (field.number() == 1) model.pieces.push_back(parse_piece(field.bytes()));
    if (field.number() == 2) {
      for (MessageReader spec(field.bytes()); spec.next();) {
        if (spec.number() == 3) model.model_type = spec.value();
        if (spec.number() == 45) model.unknown_piece = spec.bytes();
      }
    }
    if (field.number() == 3) {
      for (MessageReader spec(field.bytes()); spec.next();) {
        if (spec.number() == 2) model.has_charsmap = !spec.bytes().empty();
        if (spec.number() == 3) model.add_dummy_prefix = spec.value() != 0;
        if (spec.number() == 4) model.remove_extra_whitespaces = spec.value() != 0;
      }
    }
  }
  if (model.pieces.empty()) fail(ErrorCode::kCorrupt, "the model has no pieces");
  return model;
}

/// The model types, piece normalizations and so on that HuggingFace's conversion ignores or does not know.
void check_supported(const Model& model) {
  if (model.model_type != kBpe) {
    fail(ErrorCode::kUnsupported, "SentencePiece model type {} is not implemented (2, BPE, is)",
         model.model_type);
  }
  if (model.has_charsmap) {
    fail(ErrorCode::kUnsupported, "SentencePiece normalization by a precompiled_charsmap is not implemented");
  }
  if (model.remove_extra_whitespaces) {
    fail(ErrorCode::kUnsupported, "SentencePiece option remove_extra_whitespaces = true is not implemented");
  }
  if (!model.add_dummy_prefix) {
    fail(ErrorCode::kUnsupported, "SentencePiece option add_dummy_prefix = false is not implemented");
  }
}

/// Every way to write a piece as two pieces. Those with the best score come first, among them those with the
/// longest left part, then those with the longest right part.
json merges_by_score(const std::vector<Piece>& pieces, const Vocabulary& ids) {
  struct Merge {
    float score;
    size_t left_length, right_length;  // code points
    int32_t left, right;               // ids
    std::tuple<float, size_t, size_t> priority() const { return {score, left_length, right_length}; }
  };
  std::vector<Merge> merges;
  for (const Piece& piece : pieces) {
    const std::string_view text = piece.text;
    std::vector<size_t> starts;  // of code points
    for (size_t i = 0; i < text.size(); i += decode_utf8(text, i).length) starts.push_back(i);
    const size_t first = merges.size();
    for (size_t k = 1; k < starts.size(); ++k) {
      const auto left = ids.find(text.substr(0, starts[k])), right = ids.find(text.substr(starts[k]));
      if (left == ids.end() || right == ids.end()) continue;
      merges.push_back({piece.score, k, starts.size() - k, left->second, right->second});
    }
    std::sort(merges.begin() + first, merges.end(), [](const Merge& a, const Merge& b) {
      return std::pair(a.left, a.right) < std::pair(b.left, b.right);
    });
  }
  std::stable_sort(merges.begin(), merges.end(),
                   [](const Merge& a, const Merge& b) { return a.priority() > b.priority(); });
  json result = json::array();
  for (const Merge& merge : merges)
    result.push_back(json::array({pieces[merge.left].text, pieces[merge.right].text}));
  return result;
}

}  // namespace

json tokenizer_json_from_sentencepiece(std::string_view bytes, bool legacy, bool add_prefix_space) {
  const Model model = parse_model(bytes);
  check_supported(model);

  Vocabulary ids;
  json vocab = json::object(), added = json::array();
  for (const Piece& piece : model.pieces) {
    const auto id = static_cast<int32_t>(ids.size());
    if (!ids.emplace(piece.text, id).second)
      fail(ErrorCode::kCorrupt, "piece \"{}\" occurs twice", piece.text);
    vocab[piece.text] = id;
    if (piece.type != kUnknown && piece.type != kControl && piece.type != kUserDefined) continue;
    added.push_back({{"id", id}, {"content", piece.text}, {"special", piece.type != kUserDefined}});
  }

  const char* const space = "\u2581";
  json normalizer, pre_tokenizer;
  if (legacy) {
    json steps = json::array();
    if (add_prefix_space) steps.push_back({{"type", "Prepend"}, {"prepend", space}});
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", space}});
    normalizer = {{"type", "Sequence"}, {"normalizers", steps}};
  } else {
    pre_tokenizer = {{"type", "Metaspace"},
                     {"replacement", space},
                     {"prepend_scheme", add_prefix_space ? "first" : "never"},
                     {"split", false}};
  }
  json decoders = json::array({{{"type", "Replace"}, {"pattern", {{"String", space}}}, {"content", " "}},
                               {{"type", "ByteFallback"}},
                               {{"type", "Fuse"}}});
  if (add_prefix_space) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});

  return {{"added_tokens", std::move(added)},
          {"normalizer", std::move(normalizer)},
          {"pre_tokenizer", std::move(pre_tokenizer)},
          {"post_processor", nullptr},
          {"decoder", {{"type", "Sequence"}, {"decoders", std::move(decoders)}}},
          {"model",
           {{"type", "BPE"},
            {"unk_token", model.unknown_piece},
            {"fuse_unk", true},
            {"byte_fallback", true},
            {"vocab", std::move(vocab)},
            {"merges", merges_by_score(model.pieces, ids)}}}};
}

}  // namespace stbllm
