// Where ids are expected as constants, HuggingFace tokenizers 0.23.3 gives them for the same definition; for
// tokenizer.model it is transformers 4.57.1 (LlamaTokenizerFast).

#include "stbllm/text/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <fstream>
#include <random>

#include "support/expect_error.h"
#include "support/scratch_directory.h"
#include "text/small_tokenizers.h"

namespace stbllm {
namespace {

using nlohmann::json;
using test::added_token;
using test::byte_level_tokenizer;
using test::expect_error;
using test::sentencepiece_tokenizer;
using test::tokenizer_of;

using Ids = std::vector<int32_t>;
struct Case {
  std::string text;
  Ids ids;
  std::string decoded;
};

void expect_ids(const Tokenizer& tokenizer, const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    EXPECT_EQ(tokenizer.encode(c.text), c.ids) << testing::PrintToString(c.text);
    EXPECT_EQ(tokenizer.decode(c.ids), c.decoded) << testing::PrintToString(c.text);
  }
}

void expect_ids(const json& definition, const std::vector<Case>& cases) {
  expect_ids(*tokenizer_of({{"tokenizer.json", definition}}), cases);
}

TEST(ByteLevelTokenizer, MergesBytesWithinWords) {
  expect_ids(byte_level_tokenizer(), {
                                         {"hello world", {259, 264}, "hello world"},
                                         {"hello hello", {259, 265}, "hello hello"},
                                         {"", {}, ""},
                                         {"\u00e9 123456", {268, 32, 267, 52, 53, 54}, "\u00e9 123456"},
                                         {"he's hell", {256, 39, 115, 32, 258}, "he's hell"},
                                         {"\U0001f600", {240, 159, 152, 128}, "\U0001f600"},
                                     });
}

TEST(ByteLevelTokenizer, DropsBytesThatTheVocabularyLacks) {
  json definition = byte_level_tokenizer();
  json& model = definition["model"];
  for (const char* symbol : {"h", "\u0120"}) model["vocab"].erase(symbol);
  json merges = json::array();
  for (const json& merge : model["merges"]) {
    if (model["vocab"].contains(merge[0]) && model["vocab"].contains(merge[1])) merges.push_back(merge);
  }
  model["merges"] = merges;
  expect_ids(definition, {{"hello world", {101, 257, 111, 119, 261, 263}, "elloworld"}, {"h h", {}, ""}});
}

TEST(ByteLevelTokenizer, TakesWholeWordsWhenMergesAreIgnored) {
  json definition = byte_level_tokenizer();
  definition["model"]["ignore_merges"] = true;
  definition["model"]["vocab"]["hex"] = 269;
  expect_ids(definition,
             {{"hex", {269}, "hex"}, {"hex hex", {269, 32, 256, 120}, "hex hex"}, {"hello", {259}, "hello"}});
}

TEST(ByteLevelTokenizer, NormalizesToNfcWhereTheDefinitionAsksForIt) {
  json definition = byte_level_tokenizer();
  definition["normalizer"] = {{"type", "NFC"}};
  expect_ids(definition, {{"e\u0301", {268}, "\u00e9"}, {"\u00e9", {268}, "\u00e9"}});
}

TEST(SentencePieceTokenizer, FallsBackToBytes) {
  expect_ids(sentencepiece_tokenizer(), {
                                            {"hello", {1, 274}, "hello"},
                                            {"hello hello", {1, 274, 274}, "hello hello"},
                                            {"  a", {1, 275, 259, 260}, "  a"},
                                            {"abc", {1, 259, 277}, "abc"},
                                            {"bc x\u00e9", {1, 259, 278, 259, 123, 198, 172}, "bc x\u00e9"},
                                            {"<s>a</s> b", {1, 1, 259, 260, 2, 275, 261}, "a  b"},
                                            {"\u65e5\n", {1, 259, 233, 154, 168, 13}, "\u65e5\n"},
                                            {"", {1}, ""},
                                            {" ", {1, 275}, " "},
                                        });
}

TEST(SentencePieceTokenizer, UsesTheUnknownTokenWithoutByteFallback) {
  json definition = sentencepiece_tokenizer();
  definition["model"]["byte_fallback"] = false;
  expect_ids(definition, {{"axyb", {1, 259, 260, 0, 261}, "ab"}, {"xy z", {1, 259, 0, 259, 0}, " "}});
  definition["model"]["fuse_unk"] = false;
  expect_ids(definition, {{"axyb", {1, 259, 260, 0, 0, 261}, "ab"}, {"xy z", {1, 259, 0, 0, 259, 0}, " "}});
}

TEST(SentencePieceTokenizer, PutsMetaspaceOnlyBeforeTheStartOfTheText) {
  json definition = sentencepiece_tokenizer();
  definition["normalizer"] = nullptr;
  definition["pre_tokenizer"] = {
      {"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "first"}, {"split", false}};
  expect_ids(definition, {{"hello", {1, 274}, "hello"},
                          {"<s>hello", {1, 1, 265, 271, 272}, "hello"},
                          {" a", {1, 259, 260}, "a"},
                          {"a</s>b", {1, 259, 260, 2, 261}, "ab"}});
}

TEST(SentencePieceTokenizer, MergesALongTextThatIsOneWord) {
  std::string text;
  for (int i = 0; i < 100000; ++i) text += " hello";
  const Ids ids =
      tokenizer_of({{"tokenizer.json", sentencepiece_tokenizer()}})->encode(text.substr(1), false);
  EXPECT_EQ(ids, Ids(100000, 274));
}

TEST(AddedTokens, AreCutOutByTheirFlags) {
  json definition = byte_level_tokenizer();
  definition["added_tokens"] = {added_token(269, "<x>"),
                                added_token(270, "<xx>"),
                                added_token(271, "[l]", {"lstrip"}),
                                added_token(272, "[r]", {"rstrip"}),
                                added_token(273, "cat", {"single_word"}),
                                added_token(274, "N w", {"normalized"}),
                                added_token(275, "<sp>", {"special"})};
  expect_ids(definition,
             {
                 {"a<x>b", {97, 269, 98}, "a<x>b"},
                 {"<xx><x>", {270, 269}, "<xx><x>"},
                 {"a \n[l] b", {97, 271, 32, 98}, "a[l] b"},
                 {"a [r] \n b", {97, 32, 272, 98}, "a [r]b"},
                 {"cat, concat cat2 cat",
                  {273, 44, 32, 99, 111, 110, 99, 97, 116, 32, 99, 97, 116, 50, 32, 273},
                  "cat, concat cat2 cat"},
                 {"_cat cat\u0301", {95, 99, 97, 116, 32, 99, 97, 116, 204, 129}, "_cat cat\u0301"},
                 {"\u00b2"
                  "cat\u00b2",
                  {194, 178, 273, 194, 178},
                  "\u00b2"
                  "cat\u00b2"},
                 {"N w <sp>!", {274, 32, 275, 33}, "N w !"},
             });
}

TEST(AddedTokens, AreFoundInNormalizedTextWhenTheyAreNormalized) {
  json definition = sentencepiece_tokenizer();
  definition["added_tokens"].push_back(added_token(279, "rw", {"normalized"}));
  definition["added_tokens"].push_back(added_token(280,
                                                   "\u2581"
                                                   "b"));
  expect_ids(definition, {{"rw", {1, 279}, "rw"},
                          {"a rw", {1, 259, 260, 279}, "a rw"},
                          {"arw", {1, 259, 260, 269, 268}, "arw"},
                          {"a\u2581"
                           "b b",
                           {1, 259, 260, 280, 275, 261},
                           "a b  b"}});
}

TEST(AddedTokens, TakeTheirFlagsFromTheConfig) {
  json definition = byte_level_tokenizer();
  definition["added_tokens"] = {added_token(269, "<x>")};
  const json config = {{"added_tokens_decoder", {{"269", added_token(269, "<x>", {"special", "rstrip"})}}},
                       {"eos_token", {{"content", "hello"}}}};
  const auto tokenizer = tokenizer_of({{"tokenizer.json", definition}, {"tokenizer_config.json", config}});
  EXPECT_EQ(tokenizer->encode("a<x>  b"), (Ids{97, 269, 98}));
  EXPECT_EQ(tokenizer->decode(Ids{97, 269, 98}), "ab");
  EXPECT_EQ(tokenizer->encode("hello"), Ids{259});  // a token with a role is cut out and special
  EXPECT_EQ(tokenizer->decode(Ids{259}), "");
  EXPECT_EQ(tokenizer->eos_id(), 259);
}

TEST(SpecialTokens, AreThoseWithARoleWhateverTheirOwnEntrySays) {
  json definition = byte_level_tokenizer();
  definition["added_tokens"] = {added_token(269, "<end>"), added_token(270, "<tool>")};
  const json files = {{"tokenizer.json", definition},
                      {"tokenizer_config.json", {{"eos_token", "<end>"}}},
                      {"special_tokens_map.json", {{"additional_special_tokens", {"<tool>"}}}}};
  expect_ids(*tokenizer_of(files), {{"a<end>b<tool>", {97, 269, 98, 270}, "ab"}});
}

TEST(SpecialTokens, ComeFromThePostProcessorWhereThereIsOne) {
  const auto tokenizer =
      tokenizer_of({{"tokenizer.json", sentencepiece_tokenizer()},
                    {"tokenizer_config.json", {{"add_bos_token", false}, {"eos_token", "</s>"}}}});
  EXPECT_EQ(tokenizer->encode("hello"), (Ids{1, 274}));
  EXPECT_EQ(tokenizer->encode("hello", /*add_special_tokens=*/false), Ids{274});
  EXPECT_EQ(tokenizer->eos_id(), 2);
}

TEST(SpecialTokens, FollowTheFlagsInLlamasClassesWhateverThePostProcessorSays) {
  const auto encode = [&](const json& config) {
    return tokenizer_of({{"tokenizer.json", sentencepiece_tokenizer()}, {"tokenizer_config.json", config}})
        ->encode("hello");
  };
  const json llama = {{"tokenizer_class", "LlamaTokenizerFast"}, {"bos_token", "<s>"}, {"eos_token", "</s>"}};
  EXPECT_EQ(encode(llama), (Ids{1, 274}));
  json other = llama;
  other["add_bos_token"] = false;
  other["add_eos_token"] = true;
  EXPECT_EQ(encode(other), (Ids{274, 2}));
}

TEST(SpecialTokens, MayFollowTheTextAndStandInASequence) {
  json definition = sentencepiece_tokenizer();
  json model_template = definition["post_processor"];
  model_template["single"].push_back({{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}});
  model_template["special_tokens"]["</s>"] = {{"id", "</s>"}, {"ids", {2}}};
  definition["post_processor"] = {
      {"type", "Sequence"},
      {"processors", {{{"type", "ByteLevel"}, {"trim_offsets", false}}, model_template}}};
  expect_ids(definition, {{"hello", {1, 274, 2}, "hello"}});
}

TEST(SpecialTokens, ComeFromTheConfigWhereThereIsNoPostProcessor) {
  json definition = sentencepiece_tokenizer();
  definition["post_processor"] = nullptr;
  const auto encode = [&](const json& config) {
    return tokenizer_of({{"tokenizer.json", definition}, {"tokenizer_config.json", config}})->encode("hello");
  };
  EXPECT_EQ(encode({{"bos_token", "<s>"}}), Ids{274});
  EXPECT_EQ(encode({{"bos_token", "<s>"}, {"add_bos_token", true}}), (Ids{1, 274}));
  EXPECT_EQ(encode({{"tokenizer_class", "LlamaTokenizer"}}), (Ids{1, 274}));
  EXPECT_EQ(
      encode({{"tokenizer_class", "LlamaTokenizer"}, {"add_bos_token", false}, {"add_eos_token", true}}),
      (Ids{274, 2}));
  expect_error(ErrorCode::kMismatch, "no bos_token is in the vocabulary", [&] {
    encode({{"bos_token", "<none>"}, {"add_bos_token", true}});
  });
}

TEST(VocabAndMerges, AreGpt2WithOptsLeadingToken) {
  const json model = byte_level_tokenizer()["model"];
  json vocab = model["vocab"];
  vocab["</s>"] = 269;
  std::string merges = "#version: 0.2\n";
  for (const json& merge : model["merges"]) {
    merges += merge[0].get<std::string>() + " " + merge[1].get<std::string>() + "\n";
  }
  json files = {{"vocab.json", vocab},
                {"merges.txt", merges},
                {"tokenizer_config.json", {{"tokenizer_class", "GPT2Tokenizer"}, {"add_bos_token", true}}},
                {"special_tokens_map.json", {{"bos_token", {{"content", "</s>"}}}, {"eos_token", "</s>"}}}};
  const auto tokenizer = tokenizer_of(files);
  expect_ids(*tokenizer, {{"hello world", {269, 259, 264}, "hello world"}, {"a</s>", {269, 97, 269}, "a"}});
  EXPECT_EQ(tokenizer->vocab_size(), 270);

  files["tokenizer_config.json"] = {{"add_prefix_space", true}};
  files["added_tokens.json"] = {{"<new>", 270}};
  expect_ids(*tokenizer_of(files), {{"hello<new>", {265, 270}, " hello<new>"}});
}

/// tokenizer.model, written field by field.
class SentencePieceFile {
 public:
  static std::string varint(uint64_t value) {
    std::string bytes;
    for (; value >= 128; value /= 128) bytes += static_cast<char>(128 + value % 128);
    return bytes + static_cast<char>(value);
  }
  static std::string number(int field, uint64_t value) { return varint(field * 8) + varint(value); }
  static std::string bytes(int field, const std::string& value) {
    return varint(field * 8 + 2) + varint(value.size()) + value;
  }
  static std::string real(int field, float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    std::string result = varint(field * 8 + 5);
    for (int i = 0; i < 4; ++i) result += static_cast<char>(bits >> 8 * i & 0xff);
    return result;
  }
  static std::string piece(const std::string& text, float score, int type) {
    return bytes(1, bytes(1, text) + real(2, score) + number(3, type));
  }

  std::string trainer = number(3, 2) + number(35, 1);
  std::string normalizer = bytes(1, "identity") + number(3, 1) + number(4, 0);

  /// Pieces whose order by score is not that of their ids.
  std::string content() const {
    std::string file = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3);
    for (int byte = 0; byte < 256; ++byte) file += piece(fmt::format("<0x{:02X}>", byte), 0, 6);
    file += piece("<mine>", 0, 4);
    const std::pair<const char*, float> pieces[] = {{"\u2581", -100},
                                                    {"a", -101},
                                                    {"b", -102},
                                                    {"c", -103},
                                                    {"ab", -3},
                                                    {"bc", -1},
                                                    {"abc", -2},
                                                    {"\u2581"
                                                     "a",
                                                     -4},
                                                    {"\u2581\u2581", -5},
                                                    {"cc", -1}};
    for (const auto& [text, score] : pieces) file += piece(text, score, 1);
    return file + bytes(2, trainer) + bytes(3, normalizer);
  }
};

/// The tokenizer of a directory with this tokenizer.model.
std::unique_ptr<Tokenizer> load_model(const std::string& content, const json& config = json::object()) {
  const test::ScratchDirectory directory;
  std::ofstream(directory / "tokenizer.model", std::ios::binary) << content;
  std::ofstream(directory / "tokenizer_config.json") << config.dump();
  return Tokenizer::load(directory.path());
}

TEST(TokenizerModel, MergesByScore) {
  expect_ids(*load_model(SentencePieceFile().content()),
             {
                 {"abc", {1, 260, 266}, "abc"},
                 {"abcc", {1, 260, 266, 263}, "abcc"},
                 {" abc", {1, 268, 266}, " abc"},
                 {"a<mine>a", {1, 267, 259, 267}, "a<mine> a"},
                 {"d a</s>a", {1, 260, 103, 267, 2, 267}, "d a a"},
                 {"bccbc", {1, 260, 265, 263, 265}, "bccbc"},
             });
}

TEST(TokenizerModel, FollowsTheConfig) {
  expect_ids(*load_model(SentencePieceFile().content(), {{"legacy", false}}),
             {{" abc", {1, 260, 266}, "abc"}, {"a<mine>a", {1, 267, 259, 261}, "a<mine>a"}});
  expect_ids(*load_model(SentencePieceFile().content(), {{"add_eos_token", true}, {"add_bos_token", false}}),
             {{"d a</s>a", {260, 103, 267, 2, 267, 2}, "d a a"}});
}

TEST(TokenizerModel, SurvivesSerialization) {
  const auto tokenizer = load_model(SentencePieceFile().content(), {{"add_eos_token", true}});
  const auto copy = Tokenizer::from_serialized(tokenizer->serialize());
  EXPECT_EQ(copy->serialize(), tokenizer->serialize());
  EXPECT_EQ(copy->encode("abc \u00e9"), tokenizer->encode("abc \u00e9"));
}

TEST(TokenizerModel, RefusesWhatItDoesNotImplement) {
  using File = SentencePieceFile;
  const auto expect_unsupported = [](const std::string& trainer, const std::string& normalizer,
                                     const char* part) {
    SentencePieceFile file;
    file.trainer += trainer, file.normalizer += normalizer;
    expect_error(ErrorCode::kUnsupported, part, [&] { load_model(file.content()); });
  };
  expect_unsupported(File::number(3, 1), "", "model type 1");
  expect_unsupported("", File::bytes(2, "table"), "precompiled_charsmap");
  expect_unsupported("", File::number(4, 1), "remove_extra_whitespaces");
  expect_unsupported("", File::number(3, 0), "add_dummy_prefix");
}

TEST(TokenizerModel, ReportsDamage) {
  const std::string content = SentencePieceFile().content();
  // Cut anywhere, the file is truncated within a field or lacks its last messages.
  std::string start;  // of the file, its bytes as serialize() writes them: U+0000 to U+00FF
  for (const char c : content) {
    const json files = {{"tokenizer.model", start}};
    try {
      Tokenizer::from_serialized(files.dump());
      ADD_FAILURE() << "read a file that was cut to " << start.size() << " bytes";
    } catch (const Error& error) {
      EXPECT_THAT(error.code(), testing::AnyOf(ErrorCode::kCorrupt, ErrorCode::kUnsupported));
      EXPECT_THAT(error.what(), testing::HasSubstr("tokenizer.model: "));
    }
    const auto byte = static_cast<uint8_t>(c);
    start += byte < 0x80
                 ? std::string{c}
                 : std::string{static_cast<char>(0xc0 + byte / 64), static_cast<char>(0x80 + byte % 64)};
  }
  expect_error(ErrorCode::kCorrupt, "piece \"a\" occurs twice",
               [&] { load_model(content + SentencePieceFile::piece("a", -1, 1)); });
  expect_error(ErrorCode::kCorrupt, "no finite score",
               [&] { load_model(content + SentencePieceFile::piece("x", NAN, 1)); });
  expect_error(ErrorCode::kCorrupt, "not UTF-8",
               [&] { load_model(content + SentencePieceFile::piece("\xff", -1, 1)); });
  expect_error(ErrorCode::kCorrupt, "wire type", [&] { load_model(content + "\x0b"); });
}

TEST(Tokenizer, DecodesEveryPrefixOfAnyIds) {
  const auto byte_level = tokenizer_of({{"tokenizer.json", byte_level_tokenizer()}});
  const Ids smile = byte_level->encode("a\U0001f600");
  const std::string prefixes[] = {"", "a", "a\uFFFD", "a\uFFFD", "a\uFFFD", "a\U0001f600"};
  for (size_t n = 0; n <= smile.size(); ++n)
    EXPECT_EQ(byte_level->decode(std::span(smile).first(n)), prefixes[n]);

  const auto sentencepiece = tokenizer_of({{"tokenizer.json", sentencepiece_tokenizer()}});
  EXPECT_EQ(sentencepiece->decode(Ids{260, 233, 154}), "a\uFFFD\uFFFD");
  EXPECT_EQ(sentencepiece->decode(Ids{-1, 260, 1 << 30}), "a");  // ids that no token has
}

TEST(Tokenizer, JoinsTokensBySpacesWithoutADecoder) {
  json definition = byte_level_tokenizer();
  definition["decoder"] = nullptr;
  expect_ids(definition, {{"hello world", {259, 264}, "hello \u0120world"}});
}

TEST(Tokenizer, DecodesMetaspace) {
  json definition = sentencepiece_tokenizer();
  definition["decoder"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "always"}};
  expect_ids(definition, {{"hello hello", {1, 274, 274}, "hello hello"}});
}

TEST(Tokenizer, KeepsItsFilesVerbatim) {
  const json files = {{"tokenizer.json", sentencepiece_tokenizer()},
                      {"tokenizer_config.json", {{"eos_token", "</s>"}}}};
  const test::ScratchDirectory directory;
  for (const auto& [name, content] : files.items()) std::ofstream(directory / name) << content.dump(1);
  std::ofstream(directory / "unrelated.json") << "{}";
  const json serialized = json::parse(Tokenizer::load(directory.path())->serialize());
  EXPECT_EQ(serialized.size(), 2u);
  for (const auto& [name, content] : files.items()) EXPECT_EQ(serialized.at(name), content.dump(1));
}

TEST(Tokenizer, NamesTheFilesItLooksFor) {
  const test::ScratchDirectory directory;
  std::ofstream(directory / "vocab.json") << "{}";  // without merges.txt
  expect_error(ErrorCode::kNotFound,
               "no tokenizer; expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt",
               [&] { Tokenizer::load(directory.path()); });
  expect_error(ErrorCode::kNotFound, "no tokenizer", [&] { Tokenizer::load(directory / "absent"); });
  expect_error(ErrorCode::kNotFound, "no tokenizer", [] { Tokenizer::from_serialized("{}"); });
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = tokenizer_of({{"tokenizer.json", byte_level_tokenizer()}});
  expect_error(ErrorCode::kCorrupt, "not UTF-8 at byte 2", [&] { tokenizer->encode("ab\xff"); });
}

TEST(Tokenizer, RefusesByNameWhatItDoesNotImplement) {
  const auto expect_unsupported = [](const char* pointer, const json& value, const std::string& part) {
    json definition = sentencepiece_tokenizer();
    definition[json::json_pointer(pointer)] = value;
    expect_error(ErrorCode::kUnsupported, part, [&] { tokenizer_of({{"tokenizer.json", definition}}); });
  };
  expect_unsupported("/model/type", "Unigram", "tokenizer.json: model \"Unigram\"");
  expect_unsupported("/model/dropout", 0.5, "dropout = 0.5");
  expect_unsupported("/model/continuing_subword_prefix", "##", "continuing_subword_prefix = \"##\"");
  expect_unsupported("/model/end_of_word_suffix", "</w>", "end_of_word_suffix = \"</w>\"");
  expect_unsupported("/normalizer", {{"type", "Lowercase"}}, "normalizer \"Lowercase\"");
  expect_unsupported("/normalizer/normalizers/1/pattern", {{"Regex", " {2,}"}},
                     "regular expression is not implemented:  {2,}");
  expect_unsupported("/normalizer/normalizers/0", {{"type", "Sequence"}, {"normalizers", json::array()}},
                     "a Sequence inside a Sequence");
  expect_unsupported("/pre_tokenizer", {{"type", "Whitespace"}}, "pre_tokenizer \"Whitespace\"");
  expect_unsupported("/post_processor", {{"type", "BertProcessing"}}, "post_processor \"BertProcessing\"");
  expect_unsupported("/decoder", {{"type", "WordPiece"}}, "decoder \"WordPiece\"");
}

TEST(Tokenizer, ReportsDamagedDefinitions) {
  const auto expect_corrupt = [](const char* pointer, const json& value, const std::string& part) {
    json definition = sentencepiece_tokenizer();
    definition[json::json_pointer(pointer)] = value;
    expect_error(ErrorCode::kCorrupt, part, [&] { tokenizer_of({{"tokenizer.json", definition}}); });
  };
  expect_corrupt("/model/vocab/a", -1, "expected an id from 0 to 16777215, found -1");
  expect_corrupt("/model/vocab/a", 1e9, "found 1000000000.0");
  expect_corrupt("/model/vocab/a", 99999999999, "found 99999999999");
  expect_corrupt("/model/vocab/a", "one", "found string");
  expect_corrupt("/model/vocab/a", 261, "have the same id 261");
  expect_corrupt("/model/merges/0", "a z", "merge 0 of \"a\" and \"z\"");
  expect_corrupt("/model/merges/0", "a b c", "found \"a b c\"");
  expect_corrupt("/model/merges/0", 7, "type must be string");
  expect_corrupt("/model/unk_token", "<none>", "unknown token \"<none>\"");
  expect_corrupt("/model", nullptr, "model: expected an object, found null");
  expect_corrupt("/added_tokens/1/id", 7, "\"<s>\" has the ids 1 and 7");
  expect_corrupt("/added_tokens/1", {{"id", 5}, {"content", "<new>"}}, "have the same id 5");
  expect_corrupt("/normalizer/normalizers/1/pattern/String", "", "empty pattern");
  expect_corrupt("/post_processor/single/0/SpecialToken/id", "<none>", "<none>");
  expect_corrupt("/post_processor/special_tokens/<s>/ids/0", 5000, "adds id 5000");
  expect_corrupt("/post_processor/single/1", {{"SpecialToken", {{"id", "<s>"}}}}, "no place for the text");
  expect_error(ErrorCode::kCorrupt, "serialized tokenizer/tokenizer.json: ", [] {
    tokenizer_of({{"tokenizer.json", "{"}});
  });
  expect_error(ErrorCode::kCorrupt, "expected a JSON object", [] {
    tokenizer_of({{"tokenizer.json", "[]"}});
  });
  expect_error(ErrorCode::kCorrupt, "tokenizer_config.json: ", [] {
    tokenizer_of({{"tokenizer.json", byte_level_tokenizer()}, {"tokenizer_config.json", "{\"bos_token\": "}});
  });
  expect_error(ErrorCode::kCorrupt, "serialized tokenizer: ", [] { Tokenizer::from_serialized("no JSON"); });
  expect_error(ErrorCode::kCorrupt, "not a string of bytes", [] {
    Tokenizer::from_serialized(json{{"tokenizer.model", "\u0120"}}.dump());
  });
}

TEST(Tokenizer, RefusesStepsThatMultiplyTheText) {
  // Each step doubles what the one before it left: forty would make a terabyte of one letter.
  const auto encode_and_decode = [](const char* part, const char* list, const json& step) {
    json definition = byte_level_tokenizer();
    definition[part] = {{"type", "Sequence"}, {list, json::array()}};
    for (int i = 0; i < 40; ++i) definition[part][list].push_back(step);
    const auto tokenizer = tokenizer_of({{"tokenizer.json", definition}});
    expect_error(ErrorCode::kUnsupported, "the steps of the tokenizer make more than", [&] {
      tokenizer->encode("l \u00e9");
      tokenizer->decode(std::vector<int32_t>{108});  // "l"
    });
  };
  const json replace = {{"type", "Replace"}, {"pattern", {{"String", "l"}}}, {"content", "ll"}};
  encode_and_decode("normalizer", "normalizers", replace);
  encode_and_decode("decoder", "decoders", replace);
  encode_and_decode("pre_tokenizer", "pretokenizers",
                    {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}});
}

TEST(Tokenizer, BoundsWhatAFewBytesAskFor) {
  json definition = byte_level_tokenizer();
  definition["model"]["vocab"]["far"] = (1 << 24) - 1;
  expect_error(ErrorCode::kCorrupt, "token \"far\" has the id 16777215", [&] {
    tokenizer_of({{"tokenizer.json", definition}});
  });

  definition = byte_level_tokenizer();
  const json many = std::vector<int>(40, 0), place = {{"SpecialToken", {{"id", "a"}, {"type_id", 0}}}};
  definition["post_processor"] = {{"type", "TemplateProcessing"},
                                  {"single", {place, place, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
                                  {"special_tokens", {{"a", {{"id", "a"}, {"ids", many}}}}}};
  expect_error(ErrorCode::kCorrupt, "adds more than 64 tokens", [&] {
    tokenizer_of({{"tokenizer.json", definition}});
  });

  definition = byte_level_tokenizer();
  definition["added_tokens"] = {{{"id", 300}, {"content", std::string(257, 'x')}}};
  expect_error(ErrorCode::kUnsupported, "added token 300 has 257 bytes", [&] {
    tokenizer_of({{"tokenizer.json", definition}});
  });
}

TEST(Tokenizer, SurvivesDeepNesting) {
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  json definition = byte_level_tokenizer();
  for (const char* key :
       {"model", "normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"}) {
    definition[key] = "DEEP";
    std::string text = definition.dump();
    text.replace(text.find("\"DEEP\""), 6, deep);
    expect_error(ErrorCode::kCorrupt, "tokenizer.json: ", [&] { tokenizer_of({{"tokenizer.json", text}}); });
    definition = byte_level_tokenizer();
  }
  expect_error(ErrorCode::kCorrupt, "tokenizer_config.json: ", [&] {
    tokenizer_of({{"tokenizer.json", byte_level_tokenizer()},
                  {"tokenizer_config.json", "{\"added_tokens_decoder\": " + deep + "}"}});
  });
}

/// Loading `definition` either works, so that any text can be encoded and decoded, or throws Error.
void expect_tokenizer_or_error(const std::string& definition) {
  try {
    const auto tokenizer = Tokenizer::from_serialized(json{{"tokenizer.json", definition}}.dump());
    tokenizer->decode(tokenizer->encode("hello <s>abc \u65e5\n"));
  } catch (const Error&) {
  }
}

TEST(Tokenizer, SurvivesAnyDamage) {
  const std::string definition = sentencepiece_tokenizer().dump(-1, ' ', /*ensure_ascii=*/true);
  for (size_t size = 0; size < definition.size(); size += 11)
    expect_tokenizer_or_error(definition.substr(0, size));
  std::mt19937 random(0);
  for (int i = 0; i < 1000; ++i) {
    std::string damaged = definition;
    for (int k = 0; k < 3; ++k) damaged[random() % damaged.size()] = static_cast<char>(' ' + random() % 95);
    expect_tokenizer_or_error(damaged);
  }
}

}  // namespace
}  // namespace stbllm
