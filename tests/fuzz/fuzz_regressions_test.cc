// Every file of corpus/ and regressions/ through the function that libFuzzer calls, in the ordinary build. A
// file of regressions/ once crashed, hung or took too much memory.

#include <gtest/gtest.h>

#include <filesystem>
#include <set>
#include <string>

#include "fuzz/fuzz_target.h"
#include "support/files.h"

namespace stbllm::fuzz {
namespace {

namespace fs = std::filesystem;

const fs::path kFolder = fs::path(STBLLM_SOURCE_DIR) / "tests/fuzz";

std::set<std::string> names_of_targets() {
  std::set<std::string> names;
  for (const auto& [name, target] : targets()) names.insert(name);
  return names;
}

class Replay : public testing::TestWithParam<std::string> {};

TEST_P(Replay, OnlyErrorIsThrown) {
  const Target target = targets().at(GetParam());
  int files = 0;
  for (const char* kind : {"corpus", "regressions"}) {
    const fs::path folder = kFolder / kind / GetParam();
    if (!fs::exists(folder)) continue;
    for (const std::string& name : test::list(folder)) {
      const std::string content = test::read_all(folder / name);
      EXPECT_NO_THROW(target(std::as_bytes(std::span(content)))) << folder / name;
      ++files;
    }
  }
  EXPECT_GT(files, 0);
}

INSTANTIATE_TEST_SUITE_P(Fuzz, Replay, testing::ValuesIn(names_of_targets()),
                         [](const auto& info) { return info.param; });

TEST(Replay, EveryFolderBelongsToATarget) {
  for (const char* kind : {"corpus", "regressions"})
    for (const std::string& name : test::list(kFolder / kind)) EXPECT_TRUE(targets().contains(name)) << name;
}

}  // namespace
}  // namespace stbllm::fuzz
