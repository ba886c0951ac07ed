// Windows on their way through the blocks: however they go, they arrive as a plain forward pass does.

#include "stbllm/model/hidden_stream.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "stbllm/base/error.h"
#include "support/expect_error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using test::expect_error;

constexpr int64_t kWindows = 6, kSeqlen = 24, kExtra = 1, kHoldout = 2;

class HiddenStreamTest : public ::testing::Test {
 protected:
  HiddenStreamTest() {
    test::write_checkpoint(scratch_ / "checkpoint", test::tiny_llama());
    decoder_.emplace(Decoder::from_checkpoint(Checkpoint::open(scratch_ / "checkpoint")));
    at::manual_seed(3);
    ids_ = at::randint(decoder_->spec().vocab, {kWindows, kSeqlen}, at::kInt);
  }

  HiddenStream stream(const StreamOptions& options = {.extra = kExtra, .holdout = kHoldout}) const {
    return {*decoder_, ids_, options};
  }
  /// What leaves the first block, window by window.
  at::Tensor expected() const {
    const auto block = decoder_->block(0);
    at::Tensor out = at::empty({kWindows, kSeqlen, decoder_->spec().hidden});
    for (int64_t w = 0; w < kWindows; ++w)
      out[w].copy_(block->forward(decoder_->embed(ids_.narrow(0, w, 1)), decoder_->positions(0, kSeqlen))[0]);
    return out;
  }

  const test::ScratchDirectory scratch_;
  std::optional<Decoder> decoder_;
  at::Tensor ids_;
};

/// Products of batches and of single windows may be rounded in another order.
void expect_near(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_LT((a - b).abs().max().item<double>(), 1e-5 * b.abs().max().item<double>());
}

TEST_F(HiddenStreamTest, AdvancesAsAForwardPassDoes) {
  HiddenStream states = stream();
  const auto block = decoder_->block(0);
  expect_near(states.outputs(*block), expected());
  states.advance(*block);
  expect_near(states.states(), expected());
  states.embed(*decoder_);  // back to the start
  expect_near(states.outputs(*block), expected());
}

TEST_F(HiddenStreamTest, FromTapToTapItArrivesAtTheSameStates) {
  const auto block = decoder_->block(0);
  HiddenStream whole = stream(), steps = stream();
  std::map<Tap, std::vector<at::Tensor>> seen, seen_in_steps;
  whole.advance(*block,
                [&](Tap tap, const at::Tensor& inputs, bool) { seen[tap].push_back(inputs.clone()); });
  for (const Tap tap : kTaps) {
    int64_t next = 0;
    steps.advance_to_next_tap(*block, [&](int64_t first, const at::Tensor& inputs, bool held_out) {
      EXPECT_EQ(first, next);  // extra windows do not count
      EXPECT_EQ(held_out, first >= kWindows - kExtra - kHoldout);
      next += inputs.size(0);
      seen_in_steps[tap].push_back(inputs.clone());
    });
    EXPECT_EQ(next, kWindows - kExtra);
    EXPECT_TRUE(steps.read_inputs(0, 1).equal(seen_in_steps[tap][0].narrow(0, 0, 1)));
  }
  steps.finish_block(*block);
  EXPECT_TRUE(steps.states().equal(whole.states()));
  ASSERT_EQ(seen.size(), size_t{kTapCount});
  for (const auto& [tap, inputs] : seen) {
    ASSERT_EQ(seen_in_steps[tap].size(), inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(inputs[i].equal(seen_in_steps[tap][i]));
  }
}

TEST_F(HiddenStreamTest, ALinearReplacedBetweenTapsIsWhatTheRestSees) {
  const auto block = decoder_->block(0), other = decoder_->block(0);
  const at::Tensor weight = other->dense(Role::kO).weight() * 0.5;
  const at::Tensor bias = other->dense(Role::kO).bias();
  other->set_linear(Role::kO, std::make_unique<DenseLinear>(weight, bias));
  HiddenStream states = stream();
  for (int tap = 0; tap < 2; ++tap) states.advance_to_next_tap(*block);
  block->set_linear(Role::kO, std::make_unique<DenseLinear>(weight, bias));
  for (int tap = 2; tap < kTapCount; ++tap) states.advance_to_next_tap(*block);
  states.finish_block(*block);
  const int64_t observed = kWindows - kExtra;
  expect_near(states.states().narrow(0, kExtra, observed),
              stream().outputs(*other).narrow(0, kExtra, observed));
}

TEST_F(HiddenStreamTest, ObservesAllButExtraWindowsAndTellsWhichAreHeldOut) {
  int64_t seen = 0, held_out = 0;
  stream().observe(*decoder_->block(0), [&](Tap tap, const at::Tensor& inputs, bool held) {
    if (tap == Tap::kMlpMid) (held ? held_out : seen) += inputs.size(0);
  });
  EXPECT_EQ(seen, kWindows - kExtra - kHoldout);
  EXPECT_EQ(held_out, kHoldout);
}

TEST_F(HiddenStreamTest, InAFileItHoldsTheSameStates) {
  HiddenStream in_memory = stream(),
               in_file = stream({.extra = kExtra, .holdout = kHoldout, .spill_directory = scratch_.path()});
  const auto block = decoder_->block(0);
  in_memory.advance(*block);
  in_file.advance(*block);
  EXPECT_TRUE(in_file.states().equal(in_memory.states()));
  HiddenStream copy = in_file.copy();
  in_file.advance(*block);
  EXPECT_TRUE(copy.states().equal(in_memory.states()));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(scratch_.path()), {}),
            1);  // files have no name
}

TEST_F(HiddenStreamTest, WindowsThatNoModelCanReadAreRefused) {
  const ModelSpec& spec = decoder_->spec();
  expect_error(ErrorCode::kUsage, "at least one window", [&] { check_windows(spec, {}); });
  expect_error(ErrorCode::kUsage, "1 tokens", [&] { check_windows(spec, {{1}}); });
  expect_error(ErrorCode::kUsage, "equally long", [&] { check_windows(spec, {{1, 2}, {1, 2, 3}}); });
  expect_error(ErrorCode::kMismatch, "vocabulary", [&] {
    check_windows(spec, {{1, static_cast<int32_t>(spec.vocab)}});
  });
}

}  // namespace
}  // namespace stbllm
