// The ids of whole texts against those of HuggingFace tokenizers, by their SHA-256 (as int32, little-endian).

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "stbllm/text/corpus.h"
#include "stbllm/text/sha256.h"
#include "stbllm/text/tokenizer.h"
#include "support/files.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Ids = std::vector<int32_t>;

const fs::path kSource = STBLLM_SOURCE_DIR;
const fs::path kShared = kSource / ".." / "shared";

std::string ids_sha256(const Ids& ids) { return sha256(std::as_bytes(std::span(ids))); }

/// What the reference says of `model`, for the tokenizer in `directory`.
void expect_reference_ids(const std::string& model, const fs::path& directory) {
  if (!fs::exists(kShared)) GTEST_SKIP() << kShared << " is not there";
  if (!fs::exists(directory)) GTEST_SKIP() << directory << " is not there";
  const json reference = json::parse(std::ifstream(kShared / "reference" / "tokens.json")).at(model);
  // As a packed file gives it back.
  const auto tokenizer = Tokenizer::from_serialized(Tokenizer::load(directory)->serialize());
  const std::pair<const char*, const char*> texts[] = {{"wikitext2-test-joined", "wiki.test.raw"},
                                                       {"c4-sample", "c4-sample.txt"}};
  for (const auto& [name, file] : texts) {
    const json& expected = reference.at(name);
    const Corpus corpus = read_corpus(kShared / "data" / file);
    const Ids ids = tokenizer->encode(corpus.text);
    const Ids first = expected.at("first"), last = expected.at("last");
    ASSERT_EQ(ids.size(), expected.at("tokens").get<size_t>()) << name;
    EXPECT_EQ(Ids(ids.begin(), ids.begin() + first.size()), first) << name;
    EXPECT_EQ(Ids(ids.end() - last.size(), ids.end()), last) << name;
    EXPECT_EQ(ids_sha256(ids), expected.at("sha256_of_int32_le_ids")) << name;
    EXPECT_EQ(tokenizer->decode(ids), corpus.text) << name;
  }
}

TEST(TokenizerReference, Stories260K) {
  expect_reference_ids("stories260K", kShared / "models" / "stories260K");
}
TEST(TokenizerReference, TinyOpt) { expect_reference_ids("tiny-opt", kShared / "models" / "tiny-opt"); }
TEST(TokenizerReference, TinyMistral) {
  expect_reference_ids("tiny-mistral", kShared / "models" / "tiny-mistral");
}
TEST(TokenizerReference, SmolLm2) {
  expect_reference_ids("SmolLM2-135M", kSource / ".demo" / "SmolLM2-135M-Instruct");
}

TEST(TokenizerReference, VocabAndMergesGiveTheIdsOfTokenizerJson) {
  const fs::path directory = kShared / "models" / "tiny-opt";
  if (!fs::exists(directory)) GTEST_SKIP() << directory << " is not there";
  json files = json::object();
  for (const char* name : {"vocab.json", "merges.txt", "tokenizer_config.json"})
    files[name] = test::read_all(directory / name);
  const Corpus corpus = read_corpus(kShared / "data" / "wiki.test.raw");
  EXPECT_EQ(Tokenizer::from_serialized(files.dump())->encode(corpus.text),
            Tokenizer::load(directory)->encode(corpus.text));
}

}  // namespace
}  // namespace stbllm
