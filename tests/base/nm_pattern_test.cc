#include "stbllm/base/nm_pattern.h"

#include <gtest/gtest.h>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

TEST(NmPattern, ParsesKeptOfGroup) {
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep) {
      const NmPattern nm{keep, group};
      EXPECT_EQ(NmPattern::parse(nm.str()), nm);
    }
  EXPECT_DOUBLE_EQ(NmPattern::parse("3:8").density(), 0.375);
}

TEST(NmPattern, RefusesEverythingElseAsAUsageError) {
  for (const char* text : {"", ":", "4", "4:", ":8", "4:8:2", "0:4", "5:4", "-1:4", "2:5", "2:32", "2/4",
                           " 2:4", "2:4 ", "2 :4", "+2:4", "2.0:4", "99999999999:4", "two:four"}) {
    try {
      NmPattern::parse(text);
      ADD_FAILURE() << "accepted '" << text << "'";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUsage) << text;
      EXPECT_NE(std::string(error.what()).find("'" + std::string(text) + "'"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace stbllm
