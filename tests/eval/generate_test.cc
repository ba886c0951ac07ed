// Generation with a cache against full forward passes, and against the probabilities that the model gives.

#include "stbllm/eval/generate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <set>

#include "stbllm/base/error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

class Generate : public testing::Test {
 protected:
  Generate() {
    test::write_checkpoint(directory_.path(), test::tiny_mistral());
    decoder_ = std::make_unique<Decoder>(
        Decoder::from_checkpoint(Checkpoint::open(directory_.path()), {.keep_blocks = true}));
  }

  Generation run(const GenerateOptions& options, const std::function<bool(int32_t)>& on_token = {}) const {
    return generate(*decoder_, prompt_, options, on_token);
  }
  ErrorCode refusal(const std::vector<int32_t>& prompt, const GenerateOptions& options) const {
    try {
      generate(*decoder_, prompt, options);
    } catch (const Error& error) {
      return error.code();
    }
    ADD_FAILURE() << "no error";
    return ErrorCode{};
  }

  test::ScratchDirectory directory_;
  std::unique_ptr<Decoder> decoder_;
  const std::vector<int32_t> prompt_ = {0, 17, 230, 45, 99};
};

TEST_F(Generate, GreedyTakesTheBestTokenOfAFullForwardEachTime) {
  std::vector<int32_t> ids = prompt_, expected;
  for (int i = 0; i < 24; ++i) {  // beyond the attention window of 16
    const at::Tensor logits = decoder_->logits(decoder_->forward(at::tensor(ids, at::kInt).unsqueeze(0)));
    expected.push_back(logits[0][-1].argmax().item<int32_t>());
    ids.push_back(expected.back());
  }
  std::vector<int32_t> streamed;
  const Generation result = run({.max_tokens = 24}, [&](int32_t id) {
    streamed.push_back(id);
    return true;
  });
  EXPECT_EQ(result.ids, expected);
  EXPECT_EQ(streamed, expected);
  EXPECT_EQ(result.prompt_tokens, 5);
  EXPECT_EQ(result.decode_passes, 23);
}

TEST_F(Generate, SamplingDependsOnTheSeedAlone) {
  const GenerateOptions options{.max_tokens = 16, .temperature = 1.0, .seed = 1};
  GenerateOptions other = options;
  other.seed = 2;
  EXPECT_EQ(run(options).ids, run(options).ids);
  EXPECT_NE(run(options).ids, run(other).ids);
}

TEST_F(Generate, SampledFrequenciesFollowTheProbabilities) {
  const at::Tensor logits =
      decoder_->logits(decoder_->forward(at::tensor(prompt_, at::kInt).unsqueeze(0)))[0][-1];
  const double temperature = 0.5;
  const at::Tensor p = at::softmax(logits.to(at::kDouble) / temperature, 0);
  const auto best = p.argmax().item<int64_t>();
  const double probability = p[best].item<double>();
  constexpr int kDraws = 400;
  int hits = 0;
  for (uint64_t seed = 0; seed < kDraws; ++seed)
    hits += run({.max_tokens = 1, .temperature = temperature, .seed = seed}).ids[0] == best;
  // Four standard deviations of a binomial count.
  EXPECT_NEAR(hits, kDraws * probability, 4 * std::sqrt(kDraws * probability * (1 - probability)));
}

TEST_F(Generate, NucleusHoldsTheFewestTokensThatReachTopP) {
  EXPECT_EQ(run({.max_tokens = 8, .temperature = 1.0, .top_p = 1e-6, .seed = 3}).ids,
            run({.max_tokens = 8}).ids);
  const at::Tensor logits =
      decoder_->logits(decoder_->forward(at::tensor(prompt_, at::kInt).unsqueeze(0)))[0][-1];
  const auto [p, order] = at::softmax(logits.to(at::kDouble), 0).sort(/*dim=*/0, /*descending=*/true);
  const double top_p = 0.5 * (p[0] + p[0] + p[1]).item<double>();  // needs the second token, not the third
  std::set<int64_t> seen;
  for (uint64_t seed = 0; seed < 100; ++seed)
    seen.insert(run({.max_tokens = 1, .temperature = 1.0, .top_p = top_p, .seed = seed}).ids[0]);
  EXPECT_EQ(seen, (std::set<int64_t>{order[0].item<int64_t>(), order[1].item<int64_t>()}));
}

TEST_F(Generate, StopsWhereItIsToldTo) {
  const std::vector<int32_t> all = run({.max_tokens = 12}).ids;
  const int32_t stop = all[5];
  const std::vector<int32_t> stopped = run({.max_tokens = 12, .stop_ids = {stop}}).ids;
  EXPECT_EQ(stopped, std::vector<int32_t>(all.begin(), std::ranges::find(all, stop)));
  EXPECT_EQ(run({.max_tokens = 12}, [](int32_t) { return false; }).ids.size(), 1u);
  EXPECT_EQ(run({.max_tokens = 1000}).ids.size(), 128u - 5u);  // the model's last position
}

TEST_F(Generate, RefusesWhatItCannotDo) {
  EXPECT_EQ(refusal({}, {}), ErrorCode::kUsage);
  EXPECT_EQ(refusal(std::vector<int32_t>(128, 1), {}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({1}, {.max_tokens = 0}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({1}, {.temperature = -1}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({1}, {.top_p = 0}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({1}, {.top_p = 1.5}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({100000}, {}), ErrorCode::kMismatch);
}

}  // namespace
}  // namespace stbllm
