#include "stbllm/text/overlap.h"

#include <gtest/gtest.h>

#include <numeric>

namespace stbllm {
namespace {

std::vector<int32_t> ids(int32_t first, int64_t count) {
  std::vector<int32_t> result(static_cast<size_t>(count));
  std::iota(result.begin(), result.end(), first);
  return result;
}

TEST(Overlap, FindsWindowsAnywhereInAText) {
  const std::vector<std::string> marks = marks_of({ids(1000, 48), ids(5, 48), ids(2000, 48)});
  ASSERT_EQ(marks.size(), 3u);
  EXPECT_EQ(count_marks(ids(0, 100), marks), 1);     // the second window begins at its sixth token
  EXPECT_EQ(count_marks(ids(960, 1200), marks), 2);  // the first and the third
  EXPECT_EQ(count_marks(ids(3000, 1000), marks), 0);
}

TEST(Overlap, NeedsAllTokensOfAMark) {
  const std::vector<std::string> marks = marks_of({ids(0, 48)});  // of the tokens 8 to 39
  EXPECT_EQ(count_marks(ids(8, 32), marks), 1);
  EXPECT_EQ(count_marks(ids(9, 100), marks), 0);
  EXPECT_EQ(count_marks(ids(0, 39), marks), 0);
}

TEST(Overlap, MarksNoShortWindow) {
  EXPECT_TRUE(marks_of({ids(0, 31)}).empty());
  EXPECT_EQ(count_marks(ids(0, 10), {}), 0);
}

}  // namespace
}  // namespace stbllm
