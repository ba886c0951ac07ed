#include "stbllm/text/byte_pair_encoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <queue>
#include <utility>

#include "stbllm/base/json_fields.h"
#include "stbllm/text/tokenizer_json.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

}  // namespace

std::pair<std::string, std::string> parse_merge(const nlohmann::json& merge) {
  if (merge.is_array() && merge.size() == 2)
    return {merge[0].get<std::string>(), merge[1].get<std::string>()};
  const auto text = merge.get<std::string>();
  const size_t space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
    fail(ErrorCode::kCorrupt, "expected a merge of two tokens separated by one space, found \"{}\"", text);
  }
  return {text.substr(0, space), text.substr(space + 1)};
}

BytePairEncoder::BytePairEncoder(const nlohmann::json& model) {
  const JsonFields fields(model, "model: ");
  const std::string type = fields.text("type", "BPE");
  if (type != "BPE") fail(ErrorCode::kUnsupported, "model \"{}\" is not implemented (BPE is)", type);
  if (fields.has("dropout") && fields.at("dropout") != 0)
    fail(ErrorCode::kUnsupported, "model option dropout = {} is not implemented",
         fields.at("dropout").dump());
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const std::string affix = fields.text(key, ""); !affix.empty()) {
      fail(ErrorCode::kUnsupported, "model option {} = \"{}\" is not implemented", key, affix);
    }
  }

  for (const auto& [token, id] : model.at("vocab").items()) vocabulary_.emplace(token, parse_id(id));

  uint32_t rank = 0;
  for (const nlohmann::json& merge : model.at("merges")) {
    const auto [left, right] = parse_merge(merge);
    const int32_t left_id = find(left), right_id = find(right), id = find(left + right);
    if (left_id < 0 || right_id < 0 || id < 0) {
      fail(ErrorCode::kCorrupt, "merge {} of \"{}\" and \"{}\" needs a token that is not in the vocabulary",
           rank, left, right);
    }
    merges_[pair_key(left_id, right_id)] = {rank++, id};
  }

  if (const std::string unknown = fields.text("unk_token", ""); !unknown.empty()) {
    unknown_id_ = find(unknown);
    if (unknown_id_ < 0) {
      fail(ErrorCode::kCorrupt, "the unknown token \"{}\" is not in the vocabulary", unknown);
    }
  }
  if (fields.flag("byte_fallback", false)) {
    for (int byte = 0; byte < 256; ++byte) byte_ids_.push_back(find(fmt::format("<0x{:02X}>", byte)));
  }
  fuse_unknown_ = fields.flag("fuse_unk", false);
  ignore_merges_ = fields.flag("ignore_merges", false);
}

int32_t BytePairEncoder::find(std::string_view token) const {
  const auto it = vocabulary_.find(token);
  return it == vocabulary_.end() ? -1 : it->second;
}

const BytePairEncoder::Merge* BytePairEncoder::find_merge(int32_t left, int32_t right) const {
  const auto it = merges_.find(pair_key(left, right));
  return it == merges_.end() ? nullptr : &it->second;
}

void BytePairEncoder::encode(std::span<const std::string> words, std::vector<int32_t>& ids) const {
  std::vector<Symbol> symbols;
  for (const std::string& word : words) {
    if (ignore_merges_) {
      if (const int32_t id = find(word); id >= 0) {
        ids.push_back(id);
        continue;
      }
    }
    symbols.clear();
    append_characters(word, symbols);
    merge(symbols);
    for (const Symbol& symbol : symbols) {
      if (symbol.id >= 0) ids.push_back(symbol.id);
    }
  }
}

void BytePairEncoder::append_characters(std::string_view word, std::vector<Symbol>& symbols) const {
  const auto append = [&](int32_t id) {
    const auto index = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, index - 1, index + 1});
  };
  bool after_unknown = false;
  for (size_t i = 0; i < word.size();) {
    const std::string_view character = word.substr(i, decode_utf8(word, i).length);
    i += character.size();
    if (const int32_t id = find(character); id >= 0) {
      append(id);
      after_unknown = false;
      continue;
    }
    const auto has_token = [&](char byte) { return byte_ids_[static_cast<uint8_t>(byte)] >= 0; };
    if (!byte_ids_.empty() && std::all_of(character.begin(), character.end(), has_token)) {
      for (const char byte : character) append(byte_ids_[static_cast<uint8_t>(byte)]);
      after_unknown = false;
    } else if (unknown_id_ >= 0) {
      if (!after_unknown || !fuse_unknown_) append(unknown_id_);
      after_unknown = true;
    }
  }
  if (!symbols.empty()) symbols.back().next = -1;
}

void BytePairEncoder::merge(std::vector<Symbol>& symbols) const {
  // A candidate is rank << 32 | position of its left symbol, so that the smallest one is the next to be
  // merged. Candidates stay in the queue when a neighbour is merged away: one that is no longer the merge at
  // its position is skipped when it comes up.
  std::vector<uint64_t> candidates;
  const auto candidate = [&](int32_t left) -> const Merge* {
    const int32_t right = symbols[left].next;
    return symbols[left].id < 0 || right < 0 ? nullptr : find_merge(symbols[left].id, symbols[right].id);
  };
  const auto key = [](const Merge& merge, int32_t left) {
    return uint64_t{merge.rank} << 32 | static_cast<uint32_t>(left);
  };
  for (int32_t i = 0; i < static_cast<int32_t>(symbols.size()); ++i) {
    if (const Merge* merge = candidate(i)) candidates.push_back(key(*merge, i));
  }
  std::priority_queue queue(std::greater<>(), std::move(candidates));
  while (!queue.empty()) {
    const uint64_t top = queue.top();
    queue.pop();
    const auto left = static_cast<int32_t>(top & 0xffffffffu);
    const Merge* merge = candidate(left);
    if (merge == nullptr || merge->rank != top >> 32) continue;

    Symbol& symbol = symbols[left];
    Symbol& right = symbols[symbol.next];
    symbol.id = merge->id;
    symbol.next = right.next;
    if (right.next >= 0) symbols[right.next].previous = left;
    right.id = -1;
    for (const int32_t i : {symbol.previous, left}) {
      if (i < 0) continue;
      if (const Merge* next = candidate(i)) queue.push(key(*next, i));
    }
  }
}

}  // namespace stbllm
