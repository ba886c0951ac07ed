// Choices in one batch behind what they share, against each of them by itself.

#include "stbllm/eval/choices.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "stbllm/base/error.h"
#include "support/expect_error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using testing::ElementsAre;

/// Tensors here are tiny: more threads would only wait for each other.
[[maybe_unused]] const bool kOneThread = (at::set_num_threads(1), true);

struct TinyLm {
  explicit TinyLm(const test::TinyModel& model) {
    test::write_checkpoint(directory.path(), model);
    decoder = std::make_unique<Decoder>(
        Decoder::from_checkpoint(Checkpoint::open(directory.path()), {.keep_blocks = true}));
    tokenizer = Tokenizer::load(directory.path());
  }

  /// The sum over the continuation's tokens, from one pass over the whole choice.
  double alone(const ChoiceTokens& choice) const {
    const at::Tensor ids = at::tensor(choice.ids, at::kInt).unsqueeze(0);
    const at::Tensor log_p = at::log_softmax(decoder->logits(decoder->forward(ids))[0].to(at::kDouble), -1);
    double sum = 0;
    for (auto t = std::ssize(choice.ids) - choice.scored; t < std::ssize(choice.ids); ++t)
      sum += log_p[t - 1][choice.ids[static_cast<size_t>(t)]].item<double>();
    return sum;
  }

  test::ScratchDirectory directory;
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Tokenizer> tokenizer;
};

std::vector<int32_t> some_ids(int64_t count, int step) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i)
    ids.push_back(static_cast<int32_t>((7 + i * i * 3 + i * step) % test::kTinyVocabSize));
  return ids;
}

TEST(Choices, ScoreAsEachByItself) {
  for (const test::TinyModel& model : {test::tiny_mistral(), test::tiny_opt(), test::tiny_qwen3()}) {
    const TinyLm lm(model);
    // 24 shared tokens, more than tiny_mistral's attention window, and continuations of 1 to 9; one choice
    // begins with another; one shares nothing beyond the first 10 tokens.
    for (const int64_t shared : {24, 10, 1}) {
      std::vector<ChoiceTokens> choices;
      for (const int64_t own : {1, 4, 9, 9}) {
        std::vector<int32_t> ids = some_ids(24, 5);
        ids.resize(static_cast<size_t>(shared));
        const std::vector<int32_t> rest = some_ids(own + 2, own == 4 ? 11 : 13);
        ids.insert(ids.end(), rest.begin(), rest.end());
        choices.push_back({.ids = ids, .scored = own});
      }
      const std::vector<double> scores = log_likelihoods(*lm.decoder, choices);
      for (size_t c = 0; c < choices.size(); ++c)
        // Sums of at most nine float32 log-probabilities of about -6, whose logits come from sums of at most
        // 176 products in another order.
        EXPECT_NEAR(scores[c], lm.alone(choices[c]), 1e-3) << model.config["model_type"] << " " << shared;
    }
  }
}

TEST(Choices, AreCutAsTheHarnessDoes) {
  const TinyLm lm(test::tiny_llama());
  const auto cut = [&](const std::string& context, const std::string& continuation, int64_t most = 128) {
    return tokens_of({.context = context, .continuation = continuation}, *lm.tokenizer, most);
  };
  const ChoiceTokens plain = cut("the sun", " and");
  EXPECT_EQ(plain.ids, lm.tokenizer->encode("the sun and"));
  EXPECT_EQ(plain.scored, 1);  // " and" is one token
  // White space at the end of a context goes with the continuation.
  EXPECT_EQ(cut("the sun \n", "and").scored, std::ssize(lm.tokenizer->encode(" \nand", false)));
  // Without a context the token that begins a text stands there.
  const ChoiceTokens bare = cut("", "and");
  EXPECT_THAT(bare.ids.front(), 0);
  EXPECT_EQ(bare.scored, std::ssize(bare.ids) - 1);
  // What is too long loses its beginning.
  const ChoiceTokens whole = cut("one two three four", " and"), last = cut("one two three four", " and", 6);
  EXPECT_THAT(last.ids, testing::ElementsAreArray(whole.ids.end() - 6, whole.ids.end()));
  EXPECT_EQ(last.scored, 1);
  test::expect_error(ErrorCode::kUnsupported, "the model takes 3", [&] { cut("a", " quick brown fox", 3); });
}

TEST(Choices, AreJudgedByLikelihoodPerCharacterByteAndToken) {
  const TinyLm lm(test::tiny_llama());
  std::vector<Question> questions;
  const std::vector<std::string> endings = {" a", " the other one", " \u00e9\u00e9\u00e9", " and"};
  for (const char* context : {"he and", "on the", "in a red", "the"}) {
    Question question;
    for (const std::string& ending : endings)
      question.choices.push_back({.context = context, .continuation = ending});
    question.gold = {0, 2};
    questions.push_back(question);
  }
  int64_t told = 0;
  const Answers answers =
      answer(*lm.decoder, *lm.tokenizer, questions, [&](int64_t done) { EXPECT_EQ(done, ++told); });
  EXPECT_EQ(told, 4);
  const std::vector<double> characters = {1, 13, 3, 3}, bytes = {1, 13, 6, 3};
  const auto right = [&](const std::vector<double>& scores) {
    const auto best = std::ranges::max_element(scores) - scores.begin();
    return best == 0 || best == 2 ? 1.0 : 0.0;
  };
  for (size_t q = 0; q < questions.size(); ++q) {
    std::vector<double> sums, by_character, by_byte, by_token;
    for (size_t c = 0; c < endings.size(); ++c) {
      const ChoiceTokens tokens = tokens_of(questions[q].choices[c], *lm.tokenizer, 128);
      sums.push_back(lm.alone(tokens));
      EXPECT_NEAR(answers.log_likelihoods[q][c], sums.back(), 1e-3);
      by_character.push_back(sums.back() / characters[c]);
      by_byte.push_back(sums.back() / bytes[c]);
      by_token.push_back(sums.back() / static_cast<double>(tokens.scored));
    }
    EXPECT_EQ(answers.acc[q], right(sums));
    EXPECT_EQ(answers.acc_norm[q], right(by_character));
    EXPECT_EQ(answers.acc_bytes[q], right(by_byte));
    EXPECT_EQ(answers.acc_tokens[q], right(by_token));
  }
}

TEST(Choices, RefuseTokensThatTheModelDoesNotHave) {
  const TinyLm lm(test::tiny_llama());
  const ChoiceTokens foreign{.ids = {1, 2, 5000}, .scored = 1};
  test::expect_error(ErrorCode::kMismatch, "token id 5000", [&] {
    log_likelihoods(*lm.decoder, {foreign, foreign});
  });
}

}  // namespace
}  // namespace stbllm
