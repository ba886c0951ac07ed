// Small checkpoints as HuggingFace transformers saves them, against what transformers computes with them in
// float32 (tests/golden/make_checkpoints.py, which also says what each of them is there for).

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "stbllm/eval/perplexity.h"

namespace stbllm {
namespace {

const std::filesystem::path kGolden = std::filesystem::path(STBLLM_SOURCE_DIR) / "tests/golden/checkpoints";

/// Both programs add up the same float32 numbers in another order. A logit is the end of some 20 sums of up
/// to 72 products, each of which rounds by at most 72 units of 2^-24 of its terms' magnitudes, in practice by
/// the root of that: 20 x 9 x 2^-24 = 1e-5 of the largest logit, about 12 here. Logits are written with five
/// decimals. A part that is left out, or a bias of 0.5, moves logits by tenths.
constexpr double kLogitTolerance = 12 * 1e-5 + 0.5e-5;
/// A likelihood moves by at most twice as much as its logits.
constexpr double kNllTolerance = 2 * kLogitTolerance;

class GoldenCheckpoint : public testing::TestWithParam<std::string> {};

TEST_P(GoldenCheckpoint, GivesTheFiguresOfTransformers) {
  const at::NoGradGuard no_grad;
  std::ifstream file(kGolden / "expected.json");
  const nlohmann::json all = nlohmann::json::parse(file), &expected = all["models"].at(GetParam());
  const auto windows = all["ids"].get<Windows>();
  const Decoder decoder = Decoder::from_checkpoint(Checkpoint::open(kGolden / GetParam()));

  const Perplexity found = evaluate_perplexity(decoder, windows);
  const auto nll = expected["window_nll"].get<std::vector<double>>();
  ASSERT_EQ(found.window_nll.size(), nll.size());
  for (size_t w = 0; w < nll.size(); ++w)
    EXPECT_NEAR(found.window_nll[w], nll[w], kNllTolerance) << "window " << w;

  const at::Tensor logits = decoder.logits(final_hidden_states(decoder, windows))[-1];
  const auto positions = expected["positions"].get<std::vector<int64_t>>();
  for (size_t i = 0; i < positions.size(); ++i) {
    const at::Tensor wanted = at::tensor(expected["logits_of_last_window"][i].get<std::vector<float>>());
    ASSERT_EQ(logits.size(-1), wanted.numel());
    EXPECT_LE((logits[positions[i]] - wanted).abs().max().item<double>(), kLogitTolerance)
        << "position " << positions[i];
  }
}

INSTANTIATE_TEST_SUITE_P(, GoldenCheckpoint,
                         testing::Values("llama", "llama_biased", "mistral", "opt", "opt_350m", "qwen2",
                                         "qwen3"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace stbllm
