#include "stbllm/base/durable_file.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <vector>

#include "stbllm/base/error.h"
#include "stbllm/base/safetensors.h"
#include "stbllm/base/text_file.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using ::testing::ElementsAre;

// What was asked of the system, in order: "fsync file of 5 bytes", "rename to x", "fsync directory".
std::vector<std::string> g_calls;
int g_directory_error = 0;

int record_fsync(int fd) {
  struct stat info {};
  EXPECT_EQ(::fstat(fd, &info), 0);
  const bool directory = S_ISDIR(info.st_mode);
  g_calls.push_back(directory ? "fsync directory" : fmt::format("fsync file of {} bytes", info.st_size));
  if (!directory || g_directory_error == 0) return 0;
  errno = g_directory_error;
  return -1;
}

int record_rename(const char* from, const char* to) {
  g_calls.push_back("rename to " + fs::path(to).filename().string());
  return std::rename(from, to);
}

class DurableFile : public ::testing::Test {
 protected:
  DurableFile() {
    g_calls.clear();
    g_directory_error = 0;
    durability_calls() = {.fsync = record_fsync, .rename = record_rename};
  }
  ~DurableFile() override { durability_calls() = calls_; }

  const test::ScratchDirectory directory_;

 private:
  const DurabilityCalls calls_ = durability_calls();
};

TEST_F(DurableFile, TextReachesTheDiskBeforeItsNameDoes) {
  write_text(directory_ / "plan.json", "hello");
  EXPECT_THAT(g_calls, ElementsAre("fsync file of 5 bytes", "rename to plan.json", "fsync directory"));
  EXPECT_EQ(read_text(directory_ / "plan.json"), "hello");
}

TEST_F(DurableFile, TensorsReachTheDiskBeforeTheirFilesNameDoes) {
  SafetensorsWriter writer(directory_ / "block", /*force=*/false);
  writer.add("a", "U8", {3}, std::as_bytes(std::span("abc", 3)));
  const auto bytes = fs::file_size(writer.finish());
  writer.commit();
  EXPECT_THAT(g_calls, ElementsAre(fmt::format("fsync file of {} bytes", bytes), "rename to block",
                                   "fsync directory"));
}

TEST_F(DurableFile, AFileThatCannotReachTheDiskKeepsTheOldOne) {
  write_text(directory_ / "f", "old");
  durability_calls().fsync = [](int) {
    errno = EIO;
    return -1;
  };
  expect_error(ErrorCode::kWriteFailed, "f.part-", [&] { write_text(directory_ / "f", "new"); });
  EXPECT_EQ(read_text(directory_ / "f"), "old");
  EXPECT_THAT(test::list(directory_.path()), ElementsAre("f"));
}

TEST_F(DurableFile, ADirectoryThatCannotReachTheDiskIsAnError) {
  g_directory_error = EIO;
  expect_error(ErrorCode::kWriteFailed, directory_.path().string() + ": cannot write: Input/output error",
               [&] { write_text(directory_ / "f", "text"); });
}

TEST_F(DurableFile, AFileSystemWithoutFsyncOfDirectoriesIsGoodEnough) {
  g_directory_error = EINVAL;
  write_text(directory_ / "f", "text");
  EXPECT_EQ(read_text(directory_ / "f"), "text");
}

TEST(RenameDurably, NamesWhatIsMissing) {
  const test::ScratchDirectory directory;
  expect_error(ErrorCode::kWriteFailed, "missing: cannot write: No such file",
               [&] { rename_durably(directory / "missing", directory / "f"); });
}

TEST(ReadText, ReadsEveryByte) {
  const test::ScratchDirectory directory;
  std::string content(200'000, 'x');
  content[70'000] = '\0';
  write_text(directory / "f", content);
  write_text(directory / "empty", "");
  EXPECT_TRUE(read_text(directory / "f") == content);
  EXPECT_EQ(read_text(directory / "empty"), "");
}

TEST(ReadText, NamesWhatCannotBeRead) {
  const test::ScratchDirectory directory;
  expect_error(ErrorCode::kNotFound, "missing: cannot open", [&] { read_text(directory / "missing"); });
  expect_error(ErrorCode::kNotFound, "cannot read: Is a directory", [&] { read_text(directory.path()); });
}

}  // namespace
}  // namespace stbllm
