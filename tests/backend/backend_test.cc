#include "stbllm/backend/backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

class ForcedBackend {
 public:
  explicit ForcedBackend(const char* name) { setenv("STBLLM_BACKEND", name, 1); }
  ~ForcedBackend() { unsetenv("STBLLM_BACKEND"); }
};

ErrorCode code_of_finding(std::string_view name) {
  try {
    find_backend(name);
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr(std::string(name)));
    return error.code();
  }
  ADD_FAILURE() << name << " was found";
  return {};
}

TEST(FindBackend, FindsEveryAvailableNameAsItself) {
  for (const std::string_view name : available_backends()) EXPECT_EQ(find_backend(name).name(), name);
}

TEST(FindBackend, ListsTheReferenceFirstAndGenericCodeAlways) {
  EXPECT_EQ(available_backends().front(), "reference");
  EXPECT_THAT(available_backends(), testing::Contains("cpu-generic"));
}

TEST(FindBackend, ChoosesTheWidestInstructionSetForCpu) {
  std::string_view widest;
  for (const std::string_view name : available_backends())
    if (name.starts_with("cpu-")) widest = name;
  EXPECT_EQ(find_backend("cpu").name(), widest);
}

TEST(FindBackend, RefusesAnUnknownName) { EXPECT_EQ(code_of_finding("tpu"), ErrorCode::kUsage); }

TEST(FindBackend, SaysWhyCudaCannotRun) {
  if (testing::Matches(testing::Contains("cuda"))(available_backends()))
    GTEST_SKIP() << "a CUDA device is present";
  EXPECT_EQ(code_of_finding("cuda"), ErrorCode::kUnsupported);
}

TEST(FindBackend, LetsTheEnvironmentDecideAuto) {
  const ForcedBackend forced("cpu-generic");
  EXPECT_EQ(find_backend("auto").name(), "cpu-generic");
  EXPECT_THAT(describe_auto_backend(), testing::HasSubstr("STBLLM_BACKEND"));
}

TEST(FindBackend, IgnoresTheEnvironmentWhenANameIsGiven) {
  const ForcedBackend forced("cpu-generic");
  EXPECT_EQ(find_backend("reference").name(), "reference");
}

TEST(FindBackend, RefusesAnUnknownNameFromTheEnvironment) {
  const ForcedBackend forced("tpu");
  EXPECT_THROW(find_backend("auto"), Error);
}

TEST(FindBackend, DescribesTheAutomaticChoiceByName) {
  EXPECT_THAT(describe_auto_backend(), testing::HasSubstr(std::string(find_backend("auto").name())));
}

}  // namespace
}  // namespace stbllm
