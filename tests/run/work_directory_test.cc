// What an unfinished run has kept is taken up again as it was, or refused.

#include "stbllm/run/work_directory.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "stbllm/base/text_file.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

using test::expect_error;

/// A training of two tensors.
struct Training {
  at::Tensor tensor = at::arange(1000, at::kFloat), moments = at::arange(100, at::kFloat).to(at::kBFloat16);
  std::vector<QuantizedBlock> blocks;

  TrainingStore::VisitState visitor() {
    return [this](const StateVisitor& visit) {
      visit("block.latent", tensor);
      visit("block.latent.mean", moments);
    };
  }
};

class TrainingStoreTest : public ::testing::Test {
 protected:
  const test::ScratchDirectory scratch_;
  const WorkDirectory work_{scratch_ / "packed", {{"inputs", 1}}, /*resume=*/false, /*force=*/false};
  const std::filesystem::path file_ = work_.path() / "training" / "training.safetensors";
};

TEST_F(TrainingStoreTest, GivesBackWhatWasKeptForTheSameInputs) {
  Training none;
  EXPECT_FALSE(work_.training_store({{"seed", 0}})->load(none.blocks, none.visitor()));
  Training kept;
  work_.training_store({{"seed", 0}})->save({{"steps", 7}}, kept.blocks, kept.visitor());
  Training other;
  other.tensor.zero_();
  other.moments.zero_();
  EXPECT_FALSE(work_.training_store({{"seed", 1}})->load(other.blocks, other.visitor()));
  const auto progress = work_.training_store({{"seed", 0}})->load(other.blocks, other.visitor());
  ASSERT_TRUE(progress.has_value());
  EXPECT_EQ(progress->at("steps"), 7);
  EXPECT_TRUE(other.tensor.equal(kept.tensor));
  EXPECT_TRUE(other.moments.equal(kept.moments));
}

TEST_F(TrainingStoreTest, RefusesADamagedState) {
  Training kept;
  const auto store = work_.training_store({{"seed", 0}});
  store->save({{"steps", 7}}, kept.blocks, kept.visitor());
  const std::string whole = test::read_all(file_);
  const auto expect_refused = [&](const std::string& bytes, const std::string& part) {
    write_text(file_, bytes);
    expect_error(ErrorCode::kCorrupt, part, [&] { store->load(kept.blocks, kept.visitor()); });
  };
  std::string flipped = whole;
  flipped[flipped.size() - 1000] ^= 1;
  expect_refused(flipped, "tensor block.latent is damaged");
  std::string header = whole;
  header[20] ^= 1;
  expect_refused(header, "its header is damaged");
  expect_refused(whole.substr(0, whole.size() / 2), "remove this file, and --resume trains again");
  write_text(file_, whole);
  EXPECT_TRUE(store->load(kept.blocks, kept.visitor()).has_value());
}

}  // namespace
}  // namespace stbllm
