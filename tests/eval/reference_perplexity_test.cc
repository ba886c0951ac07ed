// Trained checkpoints give the NLL that HuggingFace transformers gave in float32
// (../shared/reference/perplexity.json), to a relative 1e-4: float32 results of another order of summation
// differ by about 1e-6. Where there is no ../shared, golden_checkpoint_test.cc compares small random ones.
//
// The first eight windows take seconds. All windows of the references take minutes: run them with
//   eval_test --gtest_also_run_disabled_tests --gtest_filter=*WholeReference*

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "stbllm/eval/perplexity.h"
#include "stbllm/text/corpus.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

constexpr double kTolerance = 1e-4;

struct Reference {
  std::string key;                  ///< in perplexity.json
  std::filesystem::path directory;  ///< relative to the source root
  int64_t first_windows = 8;        ///< of the quick test
};
void PrintTo(const Reference& value, std::ostream* out) { *out << value.key; }

const std::filesystem::path kRoot = STBLLM_SOURCE_DIR;
const std::filesystem::path kShared = kRoot / "../shared";

class ReferencePerplexity : public testing::TestWithParam<Reference> {
 protected:
  void SetUp() override {
    const std::filesystem::path file = kShared / "reference/perplexity.json";
    if (!std::filesystem::exists(file)) GTEST_SKIP() << file << " is not there";
    if (!std::filesystem::exists(kRoot / GetParam().directory))
      GTEST_SKIP() << kRoot / GetParam().directory << " is not there";
    std::ifstream stream(file);
    expected_ = nlohmann::json::parse(stream)["models"][GetParam().key];
  }

  Perplexity evaluate(int64_t windows) const {
    const std::filesystem::path directory = kRoot / GetParam().directory;
    const std::string text = read_corpus((kShared / "data/wiki.test.raw").string()).text;
    const std::vector<int32_t> ids = Tokenizer::load(directory)->encode(text);
    const Decoder decoder = Decoder::from_checkpoint(Checkpoint::open(directory));
    return evaluate_perplexity(decoder,
                               evaluation_windows(ids, expected_["seqlen"], windows, "Wikitext-2 test"));
  }

  nlohmann::json expected_;
};

TEST_P(ReferencePerplexity, FirstWindowsAgree) {
  const std::vector<double> expected = expected_["nll_of_first_8_windows"];
  const int64_t windows = GetParam().first_windows;
  const Perplexity found = evaluate(windows);
  for (size_t i = 0; i < static_cast<size_t>(windows); ++i)
    EXPECT_NEAR(found.window_nll[i], expected[i], kTolerance * expected[i]) << "window " << i;
}

TEST_P(ReferencePerplexity, DISABLED_WholeReferenceAgrees) {
  const Perplexity found = evaluate(expected_["windows"]);
  EXPECT_EQ(found.windows, expected_["windows"].get<int64_t>());
  const double expected = expected_["mean_nll"];
  EXPECT_NEAR(found.mean_nll, expected, kTolerance * expected);
  fmt::print(
      "{}: mean NLL {:.9f}, reference {:.9f} (relative {:.1e}); perplexity {:.6f} +- {:.4f}, reference "
      "{:.6f}; "
      "{:.0f} tokens/s\n",
      GetParam().key, found.mean_nll, expected, std::abs(found.mean_nll / expected - 1), found.perplexity,
      found.perplexity_error, expected_["perplexity"].get<double>(), found.tokens_per_second);
}

/// Models of ../shared where it is, and SmolLM2, which scripts/demo.sh fetches.
std::vector<Reference> references() {
  std::vector<Reference> result;
  if (std::filesystem::exists(kShared))
    result = {{"stories260K", "../shared/models/stories260K"},
              {"tiny-opt", "../shared/models/tiny-opt"},
              {"tiny-mistral", "../shared/models/tiny-mistral"},
              {"tiny-mistral@512", "../shared/models/tiny-mistral"}};
  for (const auto& [key, windows] : {std::pair{"SmolLM2-135M", 1}, {"SmolLM2-135M@512", 2}})
    result.push_back({key, ".demo/SmolLM2-135M-Instruct", windows});
  return result;
}

INSTANTIATE_TEST_SUITE_P(, ReferencePerplexity, testing::ValuesIn(references()), [](const auto& info) {
  std::string name = info.param.key;
  std::ranges::replace_if(
      name, [](char c) { return !std::isalnum(c); }, '_');
  return name;
});

}  // namespace
}  // namespace stbllm
