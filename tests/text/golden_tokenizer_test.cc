// Small tokenizers of each kind, on difficult texts, against the ids and decoded texts of HuggingFace's
// libraries (tests/golden/make_tokenizers.py).

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(STBLLM_SOURCE_DIR) / "tests/golden/tokenizers";

class GoldenTokenizer : public testing::TestWithParam<std::string> {
 protected:
  static nlohmann::json read_expected() {
    std::ifstream file(kGolden / "expected.json");
    return nlohmann::json::parse(file);
  }
};

TEST_P(GoldenTokenizer, EncodesAndDecodesAsTheLibrary) {
  static const nlohmann::json expected = read_expected();
  const nlohmann::json &texts = expected.at("texts"), &cases = expected.at("cases").at(GetParam());
  ASSERT_EQ(texts.size(), cases.size());
  const auto loaded = Tokenizer::load(kGolden / GetParam());
  // As a packed file gives it back.
  const auto tokenizer = Tokenizer::from_serialized(loaded->serialize());
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto text = texts[i].get<std::string>();
    const auto ids = cases[i].at("ids").get<std::vector<int32_t>>();
    EXPECT_EQ(tokenizer->encode(text), ids) << "text " << i << ": " << text;
    const nlohmann::json& decoded = cases[i].at("decoded");  // null: the text itself
    EXPECT_EQ(tokenizer->decode(ids), decoded.is_null() ? text : decoded.get<std::string>()) << "text " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenTokenizer,
                         testing::Values("gpt2_files", "gpt2_json", "opt_files", "llama3", "qwen2",
                                         "sentencepiece_prepend_json", "sentencepiece_prepend_model",
                                         "sentencepiece_metaspace_json", "sentencepiece_metaspace_model"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace stbllm
