#include "stbllm/base/parse_json.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/base/error.h"
#include "support/expect_error.h"

namespace stbllm {
namespace {

std::string nested(size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); }

TEST(ParseJson, ReadsWhatIsNestedUpToTheLimit) {
  EXPECT_EQ(parse_json(nested(64)).dump(), nested(64));
  EXPECT_EQ(parse_json(R"({"a": [1, "x"]})"), nlohmann::json({{"a", {1, "x"}}}));
}

TEST(ParseJson, RefusesDeeperNesting) {
  // A million is deep enough for the stack of 8 MiB to run out where such a value is written or copied.
  for (const size_t depth : {size_t{65}, size_t{1'000'000}}) {
    test::expect_error(ErrorCode::kCorrupt, "nested", [&] { parse_json(nested(depth)); });
    EXPECT_TRUE(try_parse_json(nested(depth)).is_discarded());
  }
}

TEST(ParseJson, CountsOnlyWhatIsOpenAtOnceAndOutsideOfStrings) {
  std::string neighbours = "[0";
  for (int i = 0; i < 1000; ++i) neighbours += ",[]";
  EXPECT_EQ(parse_json(neighbours + "]").size(), 1001u);
  const std::string brackets = std::string(1000, '[') + R"(\"{)";
  EXPECT_EQ(parse_json('"' + brackets + '"'), std::string(1000, '[') + "\"{");
}

TEST(ParseJson, RefusesWhatIsNoJson) {
  EXPECT_THROW(parse_json("[1,"), nlohmann::json::exception);
  EXPECT_THROW(parse_json(""), nlohmann::json::exception);
  EXPECT_TRUE(try_parse_json("[1,").is_discarded());
}

}  // namespace
}  // namespace stbllm
