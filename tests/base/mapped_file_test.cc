#include "stbllm/base/mapped_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <string>

#include "stbllm/base/error.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

ErrorCode error_of(const std::filesystem::path& path) {
  try {
    MappedFile::open(path);
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(path.string()), std::string::npos) << error.what();
    return error.code();
  }
  ADD_FAILURE() << "opened " << path;
  return {};
}

TEST(MappedFile, ShowsTheBytesBeforeAndAfterARelease) {
  const test::ScratchDirectory directory;
  std::string content;
  for (int i = 0; i < 100000; ++i) content += static_cast<char>(i * 31 >> 3);
  std::ofstream(directory / "f", std::ios::binary) << content;

  const auto file = MappedFile::open(directory / "f");
  const auto expected = std::as_bytes(std::span(content));
  EXPECT_EQ(file->path(), directory / "f");
  EXPECT_TRUE(std::ranges::equal(file->bytes(), expected));
  file->release(file->bytes());
  file->release(file->bytes().subspan(5, 20));
  EXPECT_TRUE(std::ranges::equal(file->bytes(), expected));
}

TEST(MappedFile, RefusesWhatIsNotAFileWithContent) {
  const test::ScratchDirectory directory;
  std::ofstream(directory / "empty");
  EXPECT_EQ(error_of(directory / "missing"), ErrorCode::kNotFound);
  EXPECT_EQ(error_of(directory.path()), ErrorCode::kNotFound);
  EXPECT_EQ(error_of(directory / "empty"), ErrorCode::kCorrupt);
}

TEST(MappedFileDeathTest, ATruncatedFileEndsTheProgramWithASentence) {
  const test::ScratchDirectory directory;
  std::ofstream(directory / "f", std::ios::binary) << std::string(100000, 'x');
  const auto file = MappedFile::open(directory / "f");
  std::filesystem::resize_file(directory / "f", 10);
  EXPECT_EXIT(
      {
        exit_when_mapped_file_is_lost();
        [[maybe_unused]] const volatile std::byte last = file->bytes()[99999];
      },
      testing::ExitedWithCode(static_cast<int>(ErrorCode::kCorrupt)), "/f: cannot be read any more");
}

}  // namespace
}  // namespace stbllm
