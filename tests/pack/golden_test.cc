// Files of every format version, kept in tests/golden, still mean what they meant when they were written.
//
// tests/golden/packed_v<version>.safetensors is a packed file, the .json beside it holds its decoded weights.
// Both were made by the make_packed_v<version>.py there, which shares no code with this program.

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "stbllm/base/error.h"
#include "stbllm/pack/packed_file.h"
#include "support/files.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::read_all;

fs::path golden(int version, const std::string& extension) {
  return fs::path(STBLLM_SOURCE_DIR) / fmt::format("tests/golden/packed_v{}.{}", version, extension);
}

// Whatever a damaged file lets through must be readable.
void decode_everything(const PackedReader& reader) {
  std::vector<float> values;
  for (const auto& [name, matrix] : reader.linears()) {
    values.resize(static_cast<size_t>(matrix.layout().cols));
    for (int64_t row = 0; row < matrix.layout().rows; ++row) matrix.decode_row(row, values.data());
    for (int64_t col = 0; col < matrix.layout().cols; ++col) matrix.at(matrix.layout().rows - 1, col);
  }
  for (const auto& [name, rows] : reader.quantized_rows()) {
    values.resize(static_cast<size_t>(rows.layout().cols));
    for (int64_t row = 0; row < rows.layout().rows; ++row) rows.decode_row(row, values.data());
  }
}

class GoldenVersion : public ::testing::TestWithParam<int> {};

TEST_P(GoldenVersion, DecodesToTheWeightsOfItsTime) {
  const PackedReader reader = PackedReader::open(golden(GetParam(), "safetensors"));
  EXPECT_NO_THROW(reader.verify_checksums());
  const json expected = json::parse(read_all(golden(GetParam(), "json")));
  EXPECT_EQ(reader.linears().size() + reader.quantized_rows().size(), expected.size());
  for (const auto& [name, matrix] : reader.linears()) {
    const Layout& layout = matrix.layout();
    ASSERT_EQ(expected.at(name).size(), static_cast<size_t>(layout.rows)) << name;
    std::vector<float> values(static_cast<size_t>(layout.cols));
    for (int64_t row = 0; row < layout.rows; ++row) {
      matrix.decode_row(row, values.data());
      EXPECT_EQ(expected[name][row].get<std::vector<float>>(), values) << name << " row " << row;
      for (int64_t col = 0; col < layout.cols; ++col) EXPECT_EQ(matrix.at(row, col), values[col]);
    }
  }
  for (const auto& [name, rows] : reader.quantized_rows()) {
    std::vector<float> values(static_cast<size_t>(rows.layout().cols));
    for (int64_t row = 0; row < rows.layout().rows; ++row) {
      rows.decode_row(row, values.data());
      EXPECT_EQ(expected.at(name).at(row).get<std::vector<float>>(), values) << name << " row " << row;
    }
  }
  EXPECT_EQ(reader.dense("norm").shape, std::vector<int64_t>({3}));
  EXPECT_EQ(reader.metadata("config"), R"({"model_type": "llama"})");
}

TEST_P(GoldenVersion, EveryTruncationIsRefused) {
  const test::ScratchDirectory directory;
  const fs::path path = directory / "m";
  fs::copy_file(golden(GetParam(), "safetensors"), path);
  for (uintmax_t size = fs::file_size(path); size-- > 0;) {
    fs::resize_file(path, size);
    EXPECT_THROW(PackedReader::open(path), Error) << size << " bytes";
  }
}

TEST_P(GoldenVersion, EveryFlippedHeaderBitAndDataByteIsNoticed) {
  const test::ScratchDirectory directory;
  const fs::path path = directory / "m";
  const std::string whole = read_all(golden(GetParam(), "safetensors"));
  std::ofstream(path, std::ios::binary) << whole;
  uint64_t header_bytes;
  std::memcpy(&header_bytes, whole.data(), sizeof header_bytes);
  const size_t data_start = sizeof header_bytes + header_bytes;

  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  for (size_t i = 0; i < whole.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      if (i >= data_start && bit != static_cast<int>(i % 8)) continue;
      file.seekp(static_cast<std::streamoff>(i)).put(static_cast<char>(whole[i] ^ 1 << bit)).flush();
      const auto where = fmt::format("byte {} bit {}", i, bit);
      try {
        const PackedReader reader = PackedReader::open(path);
        EXPECT_GE(i, data_start) << where;  // the header has a checksum that is always compared
        EXPECT_THROW(reader.verify_checksums(), Error) << where;
        decode_everything(reader);
      } catch (const Error&) {
      }
      file.seekp(static_cast<std::streamoff>(i)).put(whole[i]).flush();
    }
  EXPECT_NO_THROW(PackedReader::open(path).verify_checksums());
}

INSTANTIATE_TEST_SUITE_P(All, GoldenVersion, ::testing::Range(1, kPackedFormatVersion + 1));

TEST(Golden, WritingTheContentAgainGivesTheSameBytes) {
  const test::ScratchDirectory directory;
  const PackedReader reader = PackedReader::open(golden(kPackedFormatVersion, "safetensors"));
  PackedWriter writer(directory / "m", false);
  for (const auto& [name, entry] : reader.dense_tensors())
    writer.add_dense(name, entry.dtype, entry.shape, entry.data);
  for (const auto& [name, rows] : reader.quantized_rows()) writer.add_quantized_rows(name, rows);
  for (const auto& [name, matrix] : reader.linears()) writer.add_linear(name, matrix);
  writer.set_metadata("config", reader.metadata("config"));
  writer.finish();
  writer.commit();
  EXPECT_EQ(read_all(directory / "m"), read_all(golden(kPackedFormatVersion, "safetensors")));
}

}  // namespace
}  // namespace stbllm
