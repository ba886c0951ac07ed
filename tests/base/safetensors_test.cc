#include "stbllm/base/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <numeric>

#include "stbllm/base/checksum.h"
#include "stbllm/base/error.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::read_all;
using test::write_all;
using ::testing::HasSubstr;

// A file: the length of the header, the header, the data.
std::string container(const std::string& header, const std::string& data) {
  std::string file(8, '\0');
  const uint64_t length = header.size();
  std::memcpy(file.data(), &length, sizeof length);
  return file + header + data;
}

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

size_t entries(const fs::path& directory) {
  return static_cast<size_t>(std::distance(fs::directory_iterator(directory), {}));
}

// A small file with four dtypes, an empty tensor and a scalar, added in an order that is not the file's.
void write_example(const fs::path& path, bool reversed = false) {
  const std::vector<float> floats = {1.5f, -2.0f, 3.25f};
  const std::vector<int32_t> ints = {7};
  const auto as_text = [](const auto& values) {
    return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof values[0]);
  };
  struct Item {
    std::string name, dtype;
    std::vector<int64_t> shape;
    std::string data;
  };
  std::vector<Item> items = {{"codes", "U8", {5}, "abcde"},
                             {"a.weight", "F32", {3, 1}, as_text(floats)},
                             {"half", "F16", {1, 1}, "xy"},
                             {"columns", "I32", {}, as_text(ints)},
                             {"none", "F16", {0, 9}, ""}};
  if (reversed) std::ranges::reverse(items);
  SafetensorsWriter writer(path, false);
  for (const auto& item : items) writer.add(item.name, item.dtype, item.shape, bytes_of(item.data));
  writer.set_metadata("config", R"({"model_type": "llama"})");
  writer.set_metadata("text", "tab\t quote\" é");
  writer.finish();
  writer.commit();
}

TEST(SafetensorsWriter, WhatItWritesReadsBack) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  EXPECT_EQ(entries(directory.path()), 1u);

  const auto file = SafetensorsFile::open(directory / "m");
  ASSERT_EQ(file->tensors().size(), 5u);
  const TensorEntry& codes = file->tensors().at("codes");
  EXPECT_EQ(codes.dtype, "U8");
  EXPECT_EQ(codes.shape, std::vector<int64_t>({5}));
  EXPECT_TRUE(std::ranges::equal(codes.data, bytes_of("abcde")));
  float second;
  std::memcpy(&second, file->tensors().at("a.weight").data.data() + 4, 4);
  EXPECT_EQ(second, -2.0f);
  EXPECT_EQ(file->tensors().at("columns").data.size(), 4u);
  EXPECT_TRUE(file->tensors().at("none").data.empty());
  EXPECT_EQ(file->metadata().at("config"), R"({"model_type": "llama"})");
  EXPECT_EQ(file->metadata().at("text"), "tab\t quote\" é");
}

TEST(SafetensorsWriter, AlignsTheDataAndEveryElement) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  const auto file = SafetensorsFile::open(directory / "m");
  const std::byte* begin = file->file()->bytes().data();
  uint64_t header_bytes;
  std::memcpy(&header_bytes, begin, sizeof header_bytes);
  EXPECT_EQ((8 + header_bytes) % 256, 0u);
  for (const auto& [name, tensor] : file->tensors())
    EXPECT_EQ((tensor.data.data() - begin) % dtype_bytes(tensor.dtype), 0) << name;
}

TEST(SafetensorsWriter, BytesDoNotDependOnTheOrderOfArrival) {
  const test::ScratchDirectory directory;
  write_example(directory / "a");
  write_example(directory / "b", true);
  EXPECT_EQ(read_all(directory / "a"), read_all(directory / "b"));
}

TEST(SafetensorsWriter, StoresChecksumsOfEveryTensor) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  const auto file = SafetensorsFile::open(directory / "m");
  const std::string& checksums = file->metadata().at("checksums");
  for (const auto& [name, tensor] : file->tensors())
    EXPECT_THAT(checksums, HasSubstr("\"" + name + "\":\"" + checksum(tensor.data) + "\""));
  // Reference value of XXH3-64 for no input.
  EXPECT_EQ(checksum({}), "2d06800538d394c2");
}

TEST(SafetensorsWriter, ShowsNothingAtThePathBeforeCommit) {
  const test::ScratchDirectory directory;
  SafetensorsWriter writer(directory / "m", false);
  writer.add("t", "U8", {3}, bytes_of("abc"));
  EXPECT_EQ(entries(directory.path()), 0u);  // the spool has no name
  const fs::path temporary = writer.finish();
  EXPECT_FALSE(fs::exists(directory / "m"));
  EXPECT_EQ(SafetensorsFile::open(temporary)->tensors().size(), 1u);
  writer.commit();
  EXPECT_TRUE(fs::exists(directory / "m"));
  EXPECT_FALSE(fs::exists(temporary));
}

TEST(SafetensorsWriter, LeavesNothingBehindWhenAbandoned) {
  const test::ScratchDirectory directory;
  {
    SafetensorsWriter unfinished(directory / "m", false);
    unfinished.add("t", "U8", {3}, bytes_of("abc"));
    SafetensorsWriter uncommitted(directory / "m", false);
    uncommitted.finish();
    EXPECT_EQ(entries(directory.path()), 1u);
  }
  EXPECT_EQ(entries(directory.path()), 0u);
}

TEST(SafetensorsWriter, KeepsTemporaryFilesWhereItIsTold) {
  const test::ScratchDirectory directory;
  fs::create_directory(directory / "scratch");
  SafetensorsWriter writer(directory / "m", false, directory / "scratch");
  writer.add("t", "U8", {3}, bytes_of("abc"));
  EXPECT_EQ(writer.finish().parent_path(), directory / "scratch");
  EXPECT_EQ(entries(directory.path()), 1u);  // what a kill would leave is in there
  writer.commit();
  EXPECT_TRUE(fs::exists(directory / "m"));
  EXPECT_EQ(entries(directory / "scratch"), 0u);
}

TEST(SafetensorsWriter, RefusesToReplaceAFileUnlessForced) {
  const test::ScratchDirectory directory;
  write_all(directory / "m", "precious");
  expect_error(ErrorCode::kExists, "exists already", [&] { SafetensorsWriter(directory / "m", false); });
  {
    SafetensorsWriter forced(directory / "m", true);
    forced.finish();
    EXPECT_EQ(read_all(directory / "m"), "precious");
    forced.commit();
  }
  EXPECT_NO_THROW(SafetensorsFile::open(directory / "m"));
  EXPECT_EQ(entries(directory.path()), 1u);
}

TEST(SafetensorsWriter, RefusesAFileThatAppearedMeanwhile) {
  const test::ScratchDirectory directory;
  {
    SafetensorsWriter writer(directory / "m", false);
    writer.finish();
    write_all(directory / "m", "precious");
    expect_error(ErrorCode::kExists, "exists already", [&] { writer.commit(); });
  }
  EXPECT_EQ(read_all(directory / "m"), "precious");
  EXPECT_EQ(entries(directory.path()), 1u);
}

TEST(SafetensorsWriter, SaysWhereItCannotWrite) {
  const test::ScratchDirectory directory;
  expect_error(ErrorCode::kWriteFailed, "missing",
               [&] { SafetensorsWriter(directory / "missing/m", false); });
  expect_error(ErrorCode::kWriteFailed, "is a directory", [&] { SafetensorsWriter(directory.path(), true); });
  expect_error(ErrorCode::kWriteFailed, "/proc/m", [&] { SafetensorsWriter("/proc/m", false); });
}

// Makes writes fail as on a full disk, through the limit on the size of files.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    handler_ = std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    std::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_;
  void (*handler_)(int);
};

TEST(SafetensorsWriter, ReportsAFullDiskAndLeavesNothingBehind) {
  const test::ScratchDirectory directory;
  const std::string large(1 << 20, 'x');
  std::string spool_error, finish_error;
  const auto message_of = [](const std::function<void()>& action) -> std::string {
    try {
      action();
    } catch (const Error& error) {
      return error.code() == ErrorCode::kWriteFailed ? error.what() : "another code";
    }
    return "no error";
  };
  {
    const FileSizeLimit limit(1 << 20);  // the spool fits, the header and the data do not
    SafetensorsWriter writer(directory / "m", false);
    writer.add("t", "U8", {1 << 20}, bytes_of(large));
    spool_error = message_of([&] { writer.add("u", "U8", {1 << 20}, bytes_of(large)); });
  }
  {
    const FileSizeLimit limit(1 << 20);
    SafetensorsWriter writer(directory / "m", false);
    writer.add("t", "U8", {1 << 20}, bytes_of(large));
    finish_error = message_of([&] { writer.finish(); });
  }
  EXPECT_THAT(spool_error, HasSubstr("cannot write"));
  EXPECT_THAT(finish_error, HasSubstr("cannot write"));
  EXPECT_EQ(entries(directory.path()), 0u);
}

TEST(SafetensorsWriter, RefusesWrongSizesAndRepeatedNames) {
  const test::ScratchDirectory directory;
  SafetensorsWriter writer(directory / "m", false);
  writer.add("t", "F16", {2}, bytes_of("abcd"));
  EXPECT_THROW(writer.add("t", "F16", {2}, bytes_of("abcd")), std::logic_error);
  EXPECT_THROW(writer.add("u", "F16", {3}, bytes_of("abcd")), std::logic_error);
  EXPECT_THROW(writer.add("u", "F17", {2}, bytes_of("abcd")), std::logic_error);
  EXPECT_THROW(writer.add("__metadata__", "U8", {4}, bytes_of("abcd")), std::logic_error);
  EXPECT_THROW(writer.set_metadata("checksums", "{}"), std::logic_error);
  expect_error(ErrorCode::kUnsupported, "UTF-8", [&] { writer.set_metadata("binary", "\xff\xfe"); });
}

TEST(SafetensorsFile, OpensFilesOfOtherWriters) {
  const test::ScratchDirectory directory;
  write_all(directory / "m", container(R"( { "b":{"shape":[2],"data_offsets":[3,5],"dtype":"BF16","note":1},
      "a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]} }   )",
                                       "abcde"));
  // 2 elements of BF16 need 4 bytes.
  expect_error(ErrorCode::kCorrupt, "tensor 'b': shape [2] of BF16 does not fit 2 bytes",
               [&] { SafetensorsFile::open(directory / "m"); });
  write_all(directory / "m", container(R"({ "b":{"shape":[1],"data_offsets":[3,5],"dtype":"BF16","note":1},
      "a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]} }   )",
                                       "abcde"));
  const auto file = SafetensorsFile::open(directory / "m");
  EXPECT_TRUE(std::ranges::equal(file->tensors().at("b").data, bytes_of("de")));
  EXPECT_TRUE(file->metadata().empty());
}

struct BadFile {
  std::string name, content, message;
};

class BadSafetensors : public ::testing::TestWithParam<BadFile> {};

TEST_P(BadSafetensors, IsRefused) {
  const test::ScratchDirectory directory;
  write_all(directory / "m", GetParam().content);
  expect_error(ErrorCode::kCorrupt, GetParam().message, [&] { SafetensorsFile::open(directory / "m"); });
}

// A header with the one tensor "a" that is described by `fields`.
std::string tensor_a(const std::string& fields, const std::string& data = "abcd") {
  return container("{\"a\":{" + fields + "}}", data);
}

INSTANTIATE_TEST_SUITE_P(
    All, BadSafetensors,
    ::testing::Values(
        BadFile{"Empty", "", "empty"},              //
        BadFile{"TooShort", "1234567", "too few"},  //
        BadFile{"HeaderBeyondTheFile", container("{}", "").substr(0, 9), "truncated"},
        BadFile{"HugeHeader", std::string(8, '\xff') + "{}", "truncated"},
        BadFile{"NotJson", container("{\"a\":", ""), "not a JSON object"},
        BadFile{"Array", container("[]", ""), "not a JSON object"},
        BadFile{"NotUtf8", container("{\"\xff\":{}}", ""), "not a JSON object"},
        BadFile{"TextAfterTheObject", container("{} x", ""), "not a JSON object"},
        BadFile{"DeepNesting", container("{\"a\":" + std::string(100000, '[') + "}", ""),
                "nested too deeply"},
        BadFile{"RepeatedName",
                container(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}})", ""),
                "'a' appears twice"},
        BadFile{"RepeatedMember", tensor_a(R"("dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4])"),
                "'dtype' appears twice"},
        BadFile{"MetadataNotStrings", container(R"({"__metadata__":{"n":1}})", ""), "'n': expected a string"},
        BadFile{"MetadataNotAnObject", container(R"({"__metadata__":"x"})", ""), "expected '__metadata__'"},
        BadFile{"TensorNotAnObject", container(R"({"a":5})", ""), "tensor 'a'"},
        BadFile{"NoDtype", tensor_a(R"("shape":[4],"data_offsets":[0,4])"), "with a dtype"},
        BadFile{"UnknownDtype", tensor_a(R"("dtype":"U9","shape":[4],"data_offsets":[0,4])"),
                "unknown dtype 'U9'"},
        BadFile{"NoShape", tensor_a(R"("dtype":"U8","data_offsets":[0,4])"), "'shape'"},
        BadFile{"NegativeShape", tensor_a(R"("dtype":"U8","shape":[-4],"data_offsets":[0,4])"), "'shape'"},
        BadFile{"FractionalShape", tensor_a(R"("dtype":"U8","shape":[4.0],"data_offsets":[0,4])"), "'shape'"},
        BadFile{"ShapeAbove63Bits",
                tensor_a(R"("dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,4])"), "'shape'"},
        BadFile{"ShapeProductOverflows",  // 2^62 * 4 + 4 would wrap to 4
                tensor_a(R"("dtype":"U8","shape":[4611686018427387905,4],"data_offsets":[0,4])"),
                "does not fit"},
        BadFile{"SizeMismatch", tensor_a(R"("dtype":"F16","shape":[4],"data_offsets":[0,4])"),
                "does not fit 4 bytes"},
        BadFile{"OffsetsReversed", tensor_a(R"("dtype":"U8","shape":[4],"data_offsets":[4,0])"),
                "not a range"},
        BadFile{"OneOffset", tensor_a(R"("dtype":"U8","shape":[4],"data_offsets":[4])"), "not a range"},
        BadFile{"BeyondTheData", tensor_a(R"("dtype":"U8","shape":[5],"data_offsets":[0,5])"),
                "not a range within 4"},
        BadFile{"HoleBefore", tensor_a(R"("dtype":"U8","shape":[3],"data_offsets":[1,4])"), "a hole"},
        BadFile{"BytesAfter", tensor_a(R"("dtype":"U8","shape":[3],"data_offsets":[0,3])"),
                "expected 3 bytes"},
        BadFile{"Overlap",
                container(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},)"
                          R"("b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
                          "abcd"),
                "overlap"}),
    [](const auto& info) { return info.param.name; });

TEST(SafetensorsFile, EveryTruncationIsRefused) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  for (size_t size = fs::file_size(directory / "m"); size-- > 0;) {
    fs::resize_file(directory / "m", size);
    EXPECT_THROW(SafetensorsFile::open(directory / "m"), Error) << size << " bytes";
  }
}

TEST(SafetensorsFile, EveryFlippedBitOfTheHeaderIsRefused) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  const std::string whole = read_all(directory / "m");
  std::fstream file(directory / "m", std::ios::binary | std::ios::in | std::ios::out);
  const auto put = [&](size_t at, char byte) {
    file.seekp(static_cast<std::streamoff>(at)).put(byte).flush();
  };
  const size_t data_bytes = 5 + 12 + 2 + 4;
  // Without its name the checksum is an unknown metadata key; readers that require it are the ones to notice.
  const size_t member = whole.find("header_checksum"), member_end = member + std::strlen("header_checksum");
  for (size_t i = 0; i < whole.size() - data_bytes; ++i) {
    if (i >= member && i < member_end) continue;
    for (int bit = 0; bit < 8; ++bit) {
      put(i, static_cast<char>(whole[i] ^ 1 << bit));
      EXPECT_THROW(SafetensorsFile::open(directory / "m"), Error) << "byte " << i << " bit " << bit;
    }
    put(i, whole[i]);
  }
  EXPECT_NO_THROW(SafetensorsFile::open(directory / "m"));
}

}  // namespace
}  // namespace stbllm
