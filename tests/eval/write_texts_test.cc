// Texts that are written side by side against generation, which writes one.

#include "stbllm/eval/write_texts.h"

#include <gtest/gtest.h>

#include <memory>

#include "stbllm/base/error.h"
#include "stbllm/eval/generate.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using Ids = std::vector<int32_t>;

class WriteTexts : public testing::Test {
 protected:
  WriteTexts() {
    test::write_checkpoint(directory_.path(), test::tiny_mistral());
    decoder_ = std::make_unique<Decoder>(
        Decoder::from_checkpoint(Checkpoint::open(directory_.path()), {.keep_blocks = true}));
  }

  std::vector<Ids> write(const WriteTextsOptions& options) const {
    std::vector<Ids> texts;
    write_texts(
        *decoder_, [&](SplitMix64&) { return start_; }, options,
        [&](std::span<const int32_t> ids) { texts.emplace_back(ids.begin(), ids.end()); });
    return texts;
  }

  test::ScratchDirectory directory_;
  std::unique_ptr<Decoder> decoder_;
  Ids start_ = {0, 17, 230};
};

TEST_F(WriteTexts, EachIsWhatGenerationWritesAlone) {
  const WriteTextsOptions options{.tokens = 150, .longest = 40, .temperature = 1.2, .top_p = 0.9, .seed = 5};
  const std::vector<Ids> texts = write(options);
  ASSERT_EQ(texts.size(), 4u);  // the fourth exceeds 150 tokens
  SplitMix64 random(options.seed);
  for (const Ids& text : texts) {
    Ids expected = start_;
    const Generation alone = generate(*decoder_, start_,
                                      {.max_tokens = options.longest - std::ssize(start_),
                                       .temperature = options.temperature,
                                       .top_p = options.top_p,
                                       .seed = random.next()});
    expected.insert(expected.end(), alone.ids.begin(), alone.ids.end());
    EXPECT_EQ(text, expected);
  }
}

TEST_F(WriteTexts, EndBeforeAStopAndOthersFollow) {
  WriteTextsOptions options{.tokens = 200, .longest = 40, .temperature = 1.2, .seed = 5};
  const Ids first = write(options).front();
  options.stop_ids = {first[10]};
  const std::vector<Ids> texts = write(options);
  const auto at = std::ranges::find(first, first[10]) - first.begin();
  EXPECT_EQ(texts.front(), Ids(first.begin(), first.begin() + at));
  int64_t tokens = 0;
  for (const Ids& text : texts) {
    tokens += std::ssize(text);
    EXPECT_EQ(std::ranges::count(std::span(text).subspan(start_.size()), first[10]), 0);
  }
  EXPECT_GE(tokens, options.tokens);
}

TEST_F(WriteTexts, RefusesWhatHasNoRoom) {
  const auto refusal = [&](const WriteTextsOptions& options) {
    try {
      write(options);
    } catch (const Error& error) {
      return error.code();
    }
    return ErrorCode{};
  };
  EXPECT_EQ(refusal({.longest = decoder_->spec().max_positions + 1}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({.longest = std::ssize(start_)}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({.tokens = 0, .longest = 40}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({.longest = 40, .temperature = -1}), ErrorCode::kUsage);
  EXPECT_EQ(refusal({.longest = 40, .top_p = 0}), ErrorCode::kUsage);
  start_.back() = static_cast<int32_t>(decoder_->spec().vocab);
  EXPECT_NE(refusal({.longest = 40}), ErrorCode{});
}

}  // namespace
}  // namespace stbllm
