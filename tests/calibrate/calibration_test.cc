#include "stbllm/calibrate/calibration.h"

#include <gtest/gtest.h>

#include <limits>
#include <utility>
#include <vector>

#include "support/calibration_text.h"
#include "support/expect_error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using test::expect_error;

constexpr int64_t kSeqlen = 16;

/// A tiny checkpoint, and texts of one letter each.
class CalibrationOfTexts : public ::testing::Test {
 protected:
  void SetUp() override {
    test::write_checkpoint(scratch_ / "checkpoint", test::tiny_llama());
    for (const char letter : {'A', 'B', 'C'}) test::write_text(path(letter), std::string(4000, letter));
  }

  std::string path(char letter) const { return (scratch_ / std::string(1, letter)).string(); }

  Calibration make(const std::vector<std::string>& arguments, int64_t samples, int64_t distill) const {
    std::vector<CalibrationText> texts;
    for (const std::string& argument : arguments) texts.push_back(CalibrationText::parse(argument));
    return make_calibration(Checkpoint::open(scratch_ / "checkpoint"), texts, samples, distill, kSeqlen,
                            /*seed=*/0);
  }

  /// The letter of each window, in the order of the calibration.
  static std::string letters(const Calibration& calibration) {
    // Bytes are tokens 4 + byte; a text may begin with BOS.
    std::string letters;
    for (const auto& window : calibration.windows) letters += static_cast<char>(window.back() - 4);
    return letters;
  }

  test::ScratchDirectory scratch_;
};

TEST_F(CalibrationOfTexts, WindowsTakeTurnsByWeight) {
  const Calibration calibration = make({path('A') + "=3", path('B')}, /*samples=*/32, /*distill=*/8);
  EXPECT_EQ(calibration.distill_only, 8);
  EXPECT_EQ(calibration.holdout, 4);
  // Distillation's own, 28 of training, those held out: each divided three to one and mixed.
  EXPECT_EQ(letters(calibration),
            "AABAAABA"
            "AABAAABAAABAAABAAABAAABAAABA"
            "AABA");
}

TEST_F(CalibrationOfTexts, AsManyWindowsAsTheScarcestTextHas) {
  const int64_t in_one = make({path('A')}, 8, 0).windows_in_texts;
  EXPECT_GE(in_one, 4000 / kSeqlen);        // a token for each byte,
  EXPECT_LE(in_one, (4000 + 2) / kSeqlen);  // and at most one at each end
  EXPECT_EQ(make({path('A'), path('B')}, 8, 0).windows_in_texts, 2 * in_one);
  EXPECT_EQ(make({path('A') + "=3", path('B')}, 8, 0).windows_in_texts, in_one * 4 / 3);
}

TEST_F(CalibrationOfTexts, ProvenanceNamesAllTexts) {
  const auto provenance = make({path('A'), path('B') + "=0.5"}, 12, 0).provenance;
  EXPECT_EQ(provenance["corpus"], "A + B");
  ASSERT_EQ(provenance["texts"].size(), 2u);
  EXPECT_EQ(provenance["texts"][1]["weight"], 0.5);
  EXPECT_NE(provenance["texts"][0]["sha256"], provenance["texts"][1]["sha256"]);
  EXPECT_FALSE(provenance.contains("sha256"));
  EXPECT_TRUE(make({path('A')}, 12, 0).provenance.contains("sha256"));
}

TEST_F(CalibrationOfTexts, EqualShareOfOneTextIsThatText) {
  const Calibration alone = make({path('A')}, 16, 4), weighted = make({path('A') + "=7"}, 16, 4);
  EXPECT_EQ(alone.windows, weighted.windows);
  EXPECT_EQ(alone.provenance, weighted.provenance);
}

TEST_F(CalibrationOfTexts, RefusesWeightsAndTextsWithoutWindows) {
  for (const char* weight : {"=0", "=-1", "=x", "=", "=nan", "=inf"})
    expect_error(ErrorCode::kUsage, "WEIGHT", [&] { make({path('A') + weight}, 8, 0); });
  expect_error(ErrorCode::kUsage, "--nsamples", [&] { make({path('A') + "=100", path('B')}, 8, 0); });
  // A file whose name looks like a weight is a file.
  test::write_text(path('A') + "=2", std::string(4000, 'C'));
  EXPECT_EQ(letters(make({path('A') + "=2"}, 2, 0)), "CC");
}

TEST_F(CalibrationOfTexts, RefusesMoreWindowsThanMemoryCouldHold) {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max(), kBillions = 2'000'000'000;
  for (const std::pair<int64_t, int64_t>& counts :
       {std::pair(kLargest, int64_t{0}), {kBillions, 0}, {8, kBillions}, {8, kLargest}})
    expect_error(ErrorCode::kUsage, "pass a smaller --nsamples",
                 [&] { make({path('A')}, counts.first, counts.second); });
}

}  // namespace
}  // namespace stbllm
