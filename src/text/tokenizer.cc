// Tokenizers of HuggingFace checkpoints. Whatever the files, they become one definition in the form of
// tokenizer.json. A text then passes through these steps:
//   added tokens -> normalizer -> added tokens (normalized) -> pre-tokenizer -> byte pair encoder
//   -> special tokens around it

#include "stbllm/text/tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"
#include "stbllm/base/parse_json.h"
#include "stbllm/base/text_file.h"
#include "stbllm/text/sentencepiece_model.h"
#include "stbllm/text/tokenizer_json.h"
#include "stbllm/text/unicode.h"

namespace stbllm {
namespace {

using nlohmann::json;

using Files = std::map<std::string, std::string>;  // file name -> content

constexpr const char* kTokenizerJson = "tokenizer.json";
constexpr const char* kTokenizerModel = "tokenizer.model";
constexpr const char* kVocab = "vocab.json";
constexpr const char* kMerges = "merges.txt";
constexpr const char* kConfig = "tokenizer_config.json";
constexpr const char* kSpecialTokens = "special_tokens_map.json";
constexpr const char* kAddedTokens = "added_tokens.json";

/// Special tokens around a text. An item of a template names a list of ids, so that few bytes could ask for
/// many.
constexpr size_t kMostAround = 64;

/// Ids that a vocabulary may leave out, beside as many as it has.
constexpr int64_t kMostGaps = 1 << 16;

const json kNull;  // what absent members are taken for

/// Calls read(), and puts `where` before the message of what it throws.
template <typename Read>
auto reading(const std::string& where, Read read) {
  try {
    return read();
  } catch (const json::exception& error) {
    fail(ErrorCode::kCorrupt, "{}: {}", where, error.what());
  } catch (const Error& error) {
    throw Error(error.code(), where + ": " + error.what());
  }
}

/// The object in `name`, an empty one when there is no such file.
json parse_object(const Files& files, const char* name) {
  const auto file = files.find(name);
  if (file == files.end()) return json::object();
  json object = parse_json(file->second);
  if (!object.is_object()) fail(ErrorCode::kCorrupt, "expected a JSON object, found {}", object.type_name());
  return object;
}

std::string token_content(const json& token) {
  return token.is_object() ? token.at("content").get<std::string>() : token.get<std::string>();
}

/// `token` is an object with flags, or a string, which has none of them set.
AddedToken parse_added_token(const json& token, int32_t id) {
  if (!token.is_object()) return {.id = id, .content = token_content(token)};
  const JsonFields fields(token);
  return {.id = id,
          .content = token_content(token),
          .single_word = fields.flag("single_word", false),
          .lstrip = fields.flag("lstrip", false),
          .rstrip = fields.flag("rstrip", false),
          .normalized = fields.flag("normalized", false),
          .special = fields.flag("special", false)};
}

/// vocab.json + merges.txt: GPT-2's scheme.
json tokenizer_json_from_gpt2(const Files& files, const json& config) {
  json merges = json::array();
  const std::string& text = files.at(kMerges);
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    if (line.ends_with('\r')) line.pop_back();
    if (!line.empty() && !line.starts_with("#version")) merges.push_back(std::move(line));
    begin = end + 1;
  }
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", JsonFields(config).flag("add_prefix_space", false)}};
  return {
      {"pre_tokenizer", byte_level},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", parse_object(files, kVocab)}, {"merges", std::move(merges)}}}};
}

}  // namespace

/// What tokenizer_config.json and special_tokens_map.json say.
struct Tokenizer::Config {
  json tokenizer, special_tokens;

  /// The entry `role` ("bos_token"...): a string, or an object with flags; null when there is none.
  const json& named_token(const char* role) const {
    for (const json* file : {&tokenizer, &special_tokens}) {
      if (const auto it = file->find(role); it != file->end() && !it->is_null()) return *it;
    }
    return kNull;
  }
  /// LLaMA's tokenizer classes add BOS unless told otherwise.
  bool is_llama() const {
    const std::string name = JsonFields(tokenizer).text("tokenizer_class", "");
    return name.starts_with("LlamaTokenizer") || name.starts_with("CodeLlamaTokenizer");
  }
};

/// `origin` (a directory) leads the error messages.
Tokenizer::Tokenizer(Files files, const std::string& origin) : files_(std::move(files)) {
  const auto path = [&](const char* name) { return origin + "/" + name; };
  Config config;
  config.tokenizer = reading(path(kConfig), [&] { return parse_object(files_, kConfig); });
  config.special_tokens = reading(path(kSpecialTokens), [&] { return parse_object(files_, kSpecialTokens); });

  const char* const source = this->source();
  if (source == kVocab && !(files_.contains(kVocab) && files_.contains(kMerges))) {
    fail(ErrorCode::kNotFound, "{}: no tokenizer; expected {}, {}, or {} with {}", origin, kTokenizerJson,
         kTokenizerModel, kVocab, kMerges);
  }
  reading(path(source), [&] {
    const json definition = define(source, config);
    const auto component = [&](const char* name) -> const json& {
      return definition.contains(name) ? definition[name] : kNull;
    };
    encoder_.emplace(definition.at("model"));
    normalizer_ = parse_normalizer(component("normalizer"));
    pre_tokenizer_ = parse_pre_tokenizer(component("pre_tokenizer"));
    decoder_ = parse_token_decoder(component("decoder"));
    for (const json& token : component("added_tokens"))
      add_token(parse_added_token(token, parse_id(token.at("id"))));
    states_special_tokens_ = parse_post_processor(component("post_processor"));
  });
  reading(path(kAddedTokens), [&] {
    const json tokens = parse_object(files_, kAddedTokens);
    for (const auto& [content, id] : tokens.items()) {
      if (added_.contains(content)) continue;
      add_token({.id = parse_id(id), .content = content, .normalized = true});
    }
  });
  reading(path(kConfig), [&] {
    add_tokens_of_config(config);
    apply_config(config, source);
  });
  reading(path(source), [&] { index_tokens(); });
}

/// The file that defines the tokens.
const char* Tokenizer::source() const {
  return files_.contains(kTokenizerJson)    ? kTokenizerJson
         : files_.contains(kTokenizerModel) ? kTokenizerModel
                                            : kVocab;
}

json Tokenizer::definition() const {
  return define(source(), {.tokenizer = parse_object(files_, kConfig),
                           .special_tokens = parse_object(files_, kSpecialTokens)});
}

json Tokenizer::define(std::string_view source, const Config& config) const {
  if (source == kTokenizerJson) return parse_object(files_, kTokenizerJson);
  if (source == kVocab) return tokenizer_json_from_gpt2(files_, config.tokenizer);
  const JsonFields fields(config.tokenizer);
  return tokenizer_json_from_sentencepiece(files_.at(kTokenizerModel), fields.flag("legacy", true),
                                           fields.flag("add_prefix_space", true));
}

/// The id of an added token or of one in the vocabulary, -1 when there is none.
int32_t Tokenizer::find(const std::string& content) const {
  if (const auto it = added_.find(content); it != added_.end()) return it->second.id;
  const auto it = encoder_->vocabulary().find(content);
  return it == encoder_->vocabulary().end() ? -1 : it->second;
}

void Tokenizer::add_token(AddedToken token) {
  if (const int32_t id = find(token.content); id >= 0 && id != token.id) {
    fail(ErrorCode::kCorrupt, "added token \"{}\" has the ids {} and {}", token.content, id, token.id);
  }
  added_[token.content] = std::move(token);
}

/// Makes the token that has a role special. One that is not listed yet is added with the flags of `named`.
void Tokenizer::make_special(const json& named) {
  const std::string content = token_content(named);
  const int32_t id = find(content);
  if (id < 0) return;  // a token without an id cannot be in any text
  if (!added_.contains(content)) add_token(parse_added_token(named, id));
  added_.at(content).special = true;
}

/// Flags that were changed after tokenizer.json was written, tokens that were added then, and roles.
void Tokenizer::add_tokens_of_config(const Config& config) {
  if (const auto listed = config.tokenizer.find("added_tokens_decoder"); listed != config.tokenizer.end()) {
    for (const auto& [id, token] : listed->items())
      add_token(parse_added_token(token, parse_id(parse_json(id))));
  }
  for (const char* role :
       {"bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"}) {
    const json& named = config.named_token(role);
    if (!named.is_null()) make_special(named);
  }
  for (const json& token : config.named_token("additional_special_tokens")) make_special(token);
}

/// Reads the special tokens around the text from TemplateProcessing; false when there is no post-processor.
bool Tokenizer::parse_post_processor(const json& spec) {
  for_each_component(spec, "processors", [&](const json& step) {
    const std::string type = component_type(step);
    if (type == "ByteLevel") return;  // it moves offsets, not ids
    if (type != "TemplateProcessing") {
      fail(ErrorCode::kUnsupported,
           "post_processor \"{}\" is not implemented (these are: Sequence, ByteLevel, TemplateProcessing)",
           type);
    }
    bool after_text = false;
    for (const json& item : step.at("single")) {
      if (item.contains("Sequence")) {
        after_text = true;
        continue;
      }
      const json& special = step.at("special_tokens").at(item.at("SpecialToken").at("id").get<std::string>());
      for (const json& id : special.at("ids")) (after_text ? suffix_ : prefix_).push_back(parse_id(id));
      if (prefix_.size() + suffix_.size() > kMostAround)
        fail(ErrorCode::kCorrupt, "post_processor TemplateProcessing adds more than {} tokens", kMostAround);
    }
    if (!after_text) fail(ErrorCode::kCorrupt, "post_processor TemplateProcessing has no place for the text");
  });
  return !spec.is_null();
}

/// Decides which special tokens stand around the text, where the definition leaves that to the configuration.
void Tokenizer::apply_config(const Config& config, std::string_view source) {
  const bool llama = config.is_llama() || source == kTokenizerModel;
  const auto id_of = [&](const char* role, const char* llama_default) {
    const json& named = config.named_token(role);
    if (!named.is_null()) return find(token_content(named));
    return llama ? find(llama_default) : -1;
  };
  eos_id_ = id_of("eos_token", "</s>");
  // LLaMA's classes make a post-processor of their own from the flags.
  if (!states_special_tokens_ || config.is_llama()) {
    prefix_.clear();
    suffix_.clear();
    const auto add = [](std::vector<int32_t>& ids, int32_t id, const char* name) {
      if (id < 0) fail(ErrorCode::kMismatch, "add_{0} is true, but no {0} is in the vocabulary", name);
      ids.push_back(id);
    };
    const JsonFields flags(config.tokenizer);
    if (flags.flag("add_bos_token", llama)) add(prefix_, id_of("bos_token", "<s>"), "bos_token");
    if (flags.flag("add_eos_token", false)) add(suffix_, eos_id_, "eos_token");
  }
  if (eos_id_ < 0 && !suffix_.empty()) eos_id_ = suffix_.back();
}

/// Fills what encode and decode look things up in.
void Tokenizer::index_tokens() {
  const auto most = 2 * static_cast<int64_t>(encoder_->vocabulary().size() + added_.size()) + kMostGaps;
  const auto place = [&](int32_t id, const std::string& content) {
    if (id >= most)
      fail(ErrorCode::kCorrupt, "token \"{}\" has the id {}, expected one below {} in a vocabulary of {}",
           content, id, most, encoder_->vocabulary().size() + added_.size());
    if (vocab_size() <= id) tokens_.resize(id + 1), special_.resize(id + 1);
    if (!tokens_[id].empty() && tokens_[id] != content)
      fail(ErrorCode::kCorrupt, "the tokens \"{}\" and \"{}\" have the same id {}", tokens_[id], content, id);
    tokens_[id] = content;
  };
  for (const auto& [content, id] : encoder_->vocabulary()) place(id, content);
  for (const auto& [content, token] : added_) {
    place(token.id, content);
    special_[token.id] = token.special;
    std::string pattern = content;
    if (token.normalized) normalizer_(pattern);
    tokens_[token.id] = pattern;  // what the text had, so that decoding gives it back
    (token.normalized ? normalized_tokens_ : raw_tokens_).add(std::move(pattern), token);
  }
  for (const auto* ids : {&prefix_, &suffix_}) {
    for (const int32_t id : *ids) {
      if (id >= vocab_size())
        fail(ErrorCode::kCorrupt, "the post_processor adds id {}, but there are {} tokens", id, vocab_size());
    }
  }
}

std::string Tokenizer::serialize() const {
  json object = json::object();
  for (const auto& [name, content] : files_) {
    if (name != kTokenizerModel) {
      object[name] = content;
      continue;
    }
    std::string text;  // the one binary file: bytes as U+0000 to U+00FF
    for (const char byte : content) append_utf8(text, static_cast<uint8_t>(byte));
    object[name] = std::move(text);
  }
  return object.dump();
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  if (const size_t at = find_invalid_utf8(text); at != std::string_view::npos)
    fail(ErrorCode::kCorrupt, "the text to tokenize is not UTF-8 at byte {}", at);
  if (text.size() > kMaxTextBytes) {
    fail(ErrorCode::kUnsupported,
         "the text to tokenize has {} bytes, at most {} are possible at once; use a part", text.size(),
         kMaxTextBytes);
  }
  std::vector<int32_t> ids;
  if (add_special_tokens) ids = prefix_;
  for (const auto& raw : raw_tokens_.split(text)) {
    if (raw.id >= 0) {
      ids.push_back(raw.id);
      continue;
    }
    std::string normalized(text.substr(raw.begin, raw.end - raw.begin));
    normalizer_(normalized);
    for (const auto& part : normalized_tokens_.split(normalized)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
        continue;
      }
      std::vector<std::string> words = {normalized.substr(part.begin, part.end - part.begin)};
      pre_tokenizer_(words, /*at_start=*/raw.begin == 0 && part.begin == 0);
      encoder_->encode(words, ids);
    }
  }
  if (add_special_tokens) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::vector<std::string> tokens;
  for (const int32_t id : ids) {
    if (id >= 0 && id < vocab_size() && !special_[id]) tokens.push_back(tokens_[id]);
  }
  return decoder_(std::move(tokens));
}

std::unique_ptr<Tokenizer> Tokenizer::load(const std::filesystem::path& directory) {
  Files files;
  const auto exists = [&](const char* name) {
    std::error_code ignored;  // a path that cannot be looked at is as good as none
    return std::filesystem::exists(directory / name, ignored);
  };
  const auto read = [&](const char* name) {
    files[name] = read_text(directory / name);
    if (files[name].empty()) fail(ErrorCode::kCorrupt, "{}: the file is empty", (directory / name).string());
  };
  if (exists(kTokenizerJson)) {
    read(kTokenizerJson);
  } else if (exists(kTokenizerModel)) {
    read(kTokenizerModel);
  } else if (exists(kVocab) && exists(kMerges)) {
    read(kVocab), read(kMerges);
  }
  for (const char* name : {kConfig, kSpecialTokens, kAddedTokens}) {
    if (exists(name)) read(name);
  }
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(files), directory.string()));
}

std::unique_ptr<Tokenizer> Tokenizer::from_serialized(const std::string& serialized) {
  const std::string origin = "serialized tokenizer";
  Files files = reading(origin, [&] { return parse_json(serialized).get<Files>(); });
  if (const auto model = files.find(kTokenizerModel); model != files.end()) {
    std::string bytes;
    for (size_t i = 0; i < model->second.size();) {
      const CodePoint point = decode_utf8(model->second, i);
      if (point.value > 0xff)
        fail(ErrorCode::kCorrupt, "{}: {} is not a string of bytes", origin, kTokenizerModel);
      bytes += static_cast<char>(point.value);
      i += point.length;
    }
    model->second = std::move(bytes);
  }
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(files), origin));
}

}  // namespace stbllm
