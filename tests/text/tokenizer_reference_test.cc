// The ids of whole texts against those of HuggingFace tokenizers, by their SHA-256 (as int32, little-endian):
// for tokenizers and texts of ../shared where it is, and SmolLM2's, which scripts/demo.sh fetches.
// golden_tokenizer_test.cc does without.

#include <gtest/gtest.h>

#include <algorithm>
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

struct Reference {
  const char* model;  ///< in reference/tokens.json
  fs::path directory;
};
void PrintTo(const Reference& reference, std::ostream* out) { *out << reference.model; }

class TokenizerReference : public testing::TestWithParam<Reference> {};

TEST_P(TokenizerReference, GivesTheIdsOfWholeTexts) {
  const auto& [model, directory] = GetParam();
  for (const fs::path& needed : {kShared, directory})
    if (!fs::exists(needed)) GTEST_SKIP() << needed << " is not there";
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

std::vector<Reference> references() {
  std::vector<Reference> result = {{"SmolLM2-135M", kSource / ".demo" / "SmolLM2-135M-Instruct"}};
  if (fs::exists(kShared))
    for (const char* model : {"stories260K", "tiny-opt", "tiny-mistral"})
      result.push_back({model, kShared / "models" / model});
  return result;
}

INSTANTIATE_TEST_SUITE_P(, TokenizerReference, testing::ValuesIn(references()), [](const auto& info) {
  std::string name = info.param.model;
  std::ranges::replace(name, '-', '_');
  return name;
});

}  // namespace
}  // namespace stbllm
