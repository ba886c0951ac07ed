#include "stbllm/eval/perplexity.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>

#include "model/naive_transformer.h"
#include "stbllm/base/error.h"
#include "stbllm/eval/divergence.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using test::NaiveTransformer;
using test::ScratchDirectory;
using test::TinyModel;

/// Tensors here are tiny: more threads would only wait for each other.
[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

Windows some_windows(int64_t count, int64_t seqlen) {
  Windows windows;
  for (int64_t w = 0; w < count; ++w) {
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < seqlen; ++i)
      ids.push_back(static_cast<int32_t>((w * 53 + i * i * 31 + i * 5) % test::kTinyVocabSize));
    windows.push_back(ids);
  }
  return windows;
}

Decoder open_decoder(const std::filesystem::path& directory, const TinyModel& model) {
  test::write_checkpoint(directory, model);
  return Decoder::from_checkpoint(Checkpoint::open(directory));
}

/// Log-softmax of every row.
NaiveTransformer::Matrix log_probabilities_of(NaiveTransformer::Matrix logits) {
  for (auto& row : logits) {
    double total = 0;
    for (const double value : row) total += std::exp(value);
    for (double& value : row) value -= std::log(total);
  }
  return logits;
}

ErrorCode code_of(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& error) {
    return error.code();
  }
  ADD_FAILURE() << "no error";
  return ErrorCode{};
}

TEST(Perplexity, IsTheMeanOverPredictedTokensOfEveryWindow) {
  ScratchDirectory directory;
  const TinyModel model = test::tiny_llama();
  const Decoder decoder = open_decoder(directory.path(), model);
  const Windows windows = some_windows(3, 24);
  const Perplexity result = evaluate_perplexity(decoder, windows);

  const NaiveTransformer naive(model);
  double total = 0;
  for (size_t w = 0; w < windows.size(); ++w) {
    const NaiveTransformer::Matrix log_p = log_probabilities_of(naive.logits(windows[w]));
    double nll = 0;
    for (size_t t = 0; t + 1 < windows[w].size(); ++t)
      nll -= log_p[t][static_cast<size_t>(windows[w][t + 1])] / 23;
    EXPECT_NEAR(result.window_nll[w], nll, 1e-5 * nll);  // float32 logits of size ten, averaged
    total += nll / 3;
  }
  EXPECT_NEAR(result.mean_nll, total, 1e-5 * total);
  EXPECT_DOUBLE_EQ(result.perplexity, std::exp(result.mean_nll));
  EXPECT_EQ(result.windows, 3);
  EXPECT_EQ(result.seqlen, 24);
  EXPECT_EQ(result.tokens, 3 * 23);
}

TEST(Perplexity, OfTheSecondHalfIsThatOfItsTokensGivenTheWholeWindow) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory.path(), test::tiny_llama());
  for (const int64_t seqlen : {24, 25}) {
    const Windows windows = some_windows(2, seqlen);
    const Perplexity result = evaluate_perplexity(decoder, windows, {.second_half = true});
    const at::Tensor hidden = final_hidden_states(decoder, windows);
    for (int64_t w = 0; w < 2; ++w) {
      const at::Tensor nll = token_nll(decoder, hidden[w], windows[w]);  // of the tokens 1, 2, ..
      EXPECT_NEAR(result.window_nll[w], nll.slice(0, seqlen / 2).mean().item<double>(),
                  1e-6);  // other batches of logits
    }
    EXPECT_EQ(result.tokens, 2 * (seqlen - 1 - seqlen / 2));
  }
  EXPECT_EQ(code_of([&] { evaluate_perplexity(decoder, some_windows(2, 2), {.second_half = true}); }),
            ErrorCode::kUsage);
}

TEST(Perplexity, StandardErrorIsThatOfTheWindows) {
  const Perplexity result = summarize({1.0, 2.0, 4.0, 5.0}, 10, 9, 2.0);
  EXPECT_DOUBLE_EQ(result.mean_nll, 3.0);
  EXPECT_DOUBLE_EQ(result.nll_error, std::sqrt(10.0 / 3.0 / 4.0));
  EXPECT_DOUBLE_EQ(result.perplexity_error, std::exp(3.0) * result.nll_error);
  EXPECT_DOUBLE_EQ(result.tokens_per_second, 20.0);
  EXPECT_EQ(summarize({1.0}, 10, 9, 1.0).nll_error, 0.0);
}

TEST(Perplexity, DoesNotDependOnTheChunk) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory.path(), test::tiny_opt());
  const Windows windows =
      some_windows(75, 64);  // 32 windows go through a block together: chunks of 32, 32, 11
  const Perplexity whole = evaluate_perplexity(decoder, windows);
  const Perplexity chunks = evaluate_perplexity(decoder, windows, {.hidden_bytes = 1});
  EXPECT_EQ(windows_per_chunk(decoder, 64, {.hidden_bytes = 1}), 32);
  EXPECT_EQ(whole.window_nll, chunks.window_nll);  // bit for bit
}

TEST(Perplexity, DoesNotDependOnTheNumberOfThreads) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory.path(), test::tiny_llama());
  const Windows windows = some_windows(20, 100);
  const Perplexity one = evaluate_perplexity(decoder, windows);
  at::set_num_threads(2);
  const Perplexity two = evaluate_perplexity(decoder, windows);
  at::set_num_threads(1);
  EXPECT_EQ(one.window_nll, two.window_nll);  // bit for bit
}

TEST(Perplexity, RefusesWindowsThatDoNotFit) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory.path(), test::tiny_llama());
  const auto code = [&](const Windows& windows) {
    return code_of([&] { evaluate_perplexity(decoder, windows); });
  };
  EXPECT_EQ(code({}), ErrorCode::kUsage);
  EXPECT_EQ(code({{1}}), ErrorCode::kUsage);
  EXPECT_EQ(code({{1, 2, 3}, {1, 2}}), ErrorCode::kUsage);
  EXPECT_EQ(code(some_windows(1, 129)), ErrorCode::kUsage);  // the model has 128 positions
  EXPECT_EQ(code({{1, static_cast<int32_t>(test::kTinyVocabSize)}}), ErrorCode::kMismatch);
  EXPECT_EQ(code({{1, -1}}), ErrorCode::kMismatch);
}

TEST(Divergence, OfAModelFromItselfIsZero) {
  ScratchDirectory directory;
  const Decoder decoder = open_decoder(directory.path(), test::tiny_mistral());
  const Decoder* const models[] = {&decoder, &decoder};
  const Divergence result = evaluate_divergence(decoder, models, some_windows(2, 40));
  ASSERT_EQ(result.models.size(), 2u);
  for (const ModelDivergence& itself : result.models) {
    EXPECT_EQ(itself.mean_kl, 0.0);
    EXPECT_EQ(itself.nll_difference, 0.0);
    EXPECT_EQ(itself.difference_error, 0.0);
    EXPECT_EQ(itself.top1_agreement, 1.0);
    EXPECT_EQ(itself.model.tokens, 2 * 39);
    EXPECT_EQ(result.reference.window_nll, itself.model.window_nll);
  }
}

TEST(Divergence, MatchesItsDefinition) {
  ScratchDirectory directory;
  TinyModel left = test::tiny_llama(), right = test::tiny_opt();
  right.seed = 1;
  const Decoder reference = open_decoder(directory / "left", left);
  const Decoder model = open_decoder(directory / "right", right);
  const Windows windows = some_windows(2, 24);
  const auto left_logits = [&](const auto& window) { return NaiveTransformer(left).logits(window); };
  const auto right_logits = [&](const auto& window) { return NaiveTransformer(right).logits(window); };
  const Decoder* const models[] = {&reference, &model};
  for (const bool second_half : {false, true}) {
    EvaluationOptions options{.hidden_bytes = 1, .second_half = second_half};
    const Divergence result = evaluate_divergence(reference, models, windows, options);
    const ModelDivergence& found = result.models.at(1);

    const size_t first = second_half ? 12 : 0, scored = 23 - first;
    double kl = 0, agreement = 0;
    std::vector<double> differences;
    for (const auto& window : windows) {
      const auto log_p = log_probabilities_of(left_logits(window));
      const auto log_q = log_probabilities_of(right_logits(window));
      double difference = 0;
      for (size_t t = first; t + 1 < window.size(); ++t) {
        for (size_t v = 0; v < log_p[t].size(); ++v)
          kl += std::exp(log_p[t][v]) * (log_p[t][v] - log_q[t][v]);
        agreement += std::ranges::max_element(log_p[t]) - log_p[t].begin() ==
                     std::ranges::max_element(log_q[t]) - log_q[t].begin();
        difference += log_p[t][window[t + 1]] - log_q[t][window[t + 1]];
      }
      differences.push_back(difference / static_cast<double>(scored));
    }
    const auto positions = static_cast<double>(2 * scored);
    EXPECT_NEAR(found.mean_kl, kl / positions, 1e-5 * kl);
    EXPECT_NEAR(found.top1_agreement, agreement / positions, 1e-12);
    EXPECT_GT(found.kl_error, 0.0);
    // Of two values: half their distance. Logits agree to float32's rounding.
    EXPECT_NEAR(found.nll_difference, (differences[0] + differences[1]) / 2, 1e-4);
    EXPECT_NEAR(found.difference_error, std::abs(differences[0] - differences[1]) / 2, 1e-4);
    EXPECT_EQ(result.reference.window_nll, evaluate_perplexity(reference, windows, options).window_nll);
    EXPECT_EQ(found.model.window_nll, evaluate_perplexity(model, windows, options).window_nll);
    EXPECT_EQ(result.models.at(0).mean_kl, 0.0);
  }
}

}  // namespace
}  // namespace stbllm
