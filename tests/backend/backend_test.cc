#include "stbllm/backend/backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "stbllm/base/error.h"
#include "support/expect_error.h"

namespace stbllm {
namespace {

/// Sets the environment variable for a scope.
class ForcedBackend {
 public:
  explicit ForcedBackend(const char* name) { setenv("STBLLM_BACKEND", name, 1); }
  ~ForcedBackend() { unsetenv("STBLLM_BACKEND"); }
};

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

TEST(FindBackend, RefusesAnUnknownNameAndListsThoseThatCanRun) {
  test::expect_error(ErrorCode::kUsage, "cpu-generic", [] { find_backend("tpu"); });
}

TEST(FindBackend, SaysWhyCudaCannotRun) {
  if (testing::Matches(testing::Contains("cuda"))(available_backends()))
    GTEST_SKIP() << "a CUDA device is present";
  test::expect_error(ErrorCode::kUnsupported, "'cuda' cannot run here", [] { find_backend("cuda"); });
}

TEST(FindBackend, LetsTheEnvironmentDecideAuto) {
  const ForcedBackend forced("cpu-generic");
  EXPECT_EQ(find_backend("auto").name(), "cpu-generic");
  EXPECT_THAT(describe_auto_backend(), testing::HasSubstr("STBLLM_BACKEND"));
}

TEST(FindBackend, TakesAnEmptyVariableAndTheWordAutoForNoChoice) {
  const std::string unset_choice(find_backend("auto").name());
  EXPECT_EQ(backend_of_environment(), "");
  for (const char* value : {"", "auto"}) {
    const ForcedBackend forced(value);
    EXPECT_EQ(backend_of_environment(), "") << '"' << value << '"';
    EXPECT_EQ(find_backend("auto").name(), unset_choice) << '"' << value << '"';
  }
  const ForcedBackend forced("reference");
  EXPECT_EQ(backend_of_environment(), "reference");
}

TEST(FindBackend, IgnoresTheEnvironmentWhenANameIsGiven) {
  const ForcedBackend forced("cpu-generic");
  EXPECT_EQ(find_backend("reference").name(), "reference");
}

TEST(FindBackend, RefusesAnUnknownNameFromTheEnvironment) {
  const ForcedBackend forced("tpu");
  test::expect_error(ErrorCode::kUsage, "'tpu'", [] { find_backend("auto"); });
}

TEST(FindBackend, DescribesTheAutomaticChoiceByName) {
  EXPECT_THAT(describe_auto_backend(), testing::HasSubstr(std::string(find_backend("auto").name())));
}

}  // namespace
}  // namespace stbllm
