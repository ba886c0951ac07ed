#include "stbllm/pack/packed_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "stbllm/base/error.h"
#include "support/files.h"
#include "support/random_matrix.h"
#include "support/scratch_directory.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;

constexpr Layout kUp{.rows = 6,
                     .cols = 75,
                     .nm = {2, 4},
                     .levels = 3,
                     .column_block = 32,
                     .scale_bits = 5,
                     .salient = 2,
                     .outliers = 3};
constexpr Layout kDown{.rows = 3, .cols = 48, .nm = {4, 8}};

std::span<const std::byte> bytes_of(const std::string& text) { return std::as_bytes(std::span(text)); }

QuantizedRows example_rows(int bits) {
  return QuantizedRows::encode(
      {.rows = 5, .cols = 70, .bits = bits},
      [](int64_t row, float* out) {
        for (int64_t col = 0; col < 70; ++col)
          out[col] = 0.01f * static_cast<float>((row * 70 + col) * 37 % 101 - 50);
      },
      "example");
}

void write_example(const fs::path& path) {
  PackedWriter writer(path, true);
  writer.set_metadata("config", R"({"hidden_size": 75})");
  writer.add_linear("layers.0.up", test::random_matrix(kUp, 1));
  writer.add_linear("layers.0.down", test::random_matrix(kDown, 2));
  writer.add_quantized_rows("embed", example_rows(8));
  writer.add_quantized_rows("head", example_rows(4));
  writer.add_dense("norm", "F32", {2}, bytes_of("abcdefgh"));
  writer.finish();
  writer.commit();
}

std::string error_of(const fs::path& path, ErrorCode code = ErrorCode::kCorrupt) {
  try {
    PackedReader::open(path);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    return error.what();
  }
  return "no error";
}

// Writes the example again with `change` applied to its metadata and tensors.
struct Parts {
  std::map<std::string, std::string> metadata;
  std::map<std::string, TensorEntry> tensors;
};

void rewrite(const fs::path& from, const fs::path& to, const std::function<void(Parts&)>& change) {
  const auto file = SafetensorsFile::open(from);
  Parts parts{file->metadata(), file->tensors()};
  parts.metadata.erase("checksums");
  parts.metadata.erase("header_checksum");
  change(parts);
  SafetensorsWriter writer(to, true);
  for (const auto& [name, tensor] : parts.tensors) writer.add(name, tensor.dtype, tensor.shape, tensor.data);
  for (const auto& [key, value] : parts.metadata) writer.set_metadata(key, value);
  writer.finish();
  writer.commit();
}

TEST(PackedFile, EverythingComesBack) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  const PackedReader reader = PackedReader::open(directory / "m");

  ASSERT_EQ(reader.linears().size(), 2u);
  for (const auto& [name, expected] : {std::pair{"layers.0.up", test::random_matrix(kUp, 1)},
                                       {"layers.0.down", test::random_matrix(kDown, 2)}}) {
    const StructuredBinaryMatrix& matrix = reader.linears().at(name);
    EXPECT_EQ(matrix.layout(), expected.layout());
    for (int i = 0; i < kPlaneCount; ++i)
      EXPECT_TRUE(
          std::ranges::equal(matrix.plane(static_cast<Plane>(i)), expected.plane(static_cast<Plane>(i))));
  }
  ASSERT_EQ(reader.quantized_rows().size(), 2u);
  for (const auto& [name, bits] : {std::pair{"embed", 8}, {"head", 4}}) {
    const QuantizedRows& rows = reader.quantized_rows().at(name);
    EXPECT_EQ(rows.layout(), example_rows(bits).layout());
    EXPECT_TRUE(std::ranges::equal(rows.codes(), example_rows(bits).codes()));
    EXPECT_TRUE(std::ranges::equal(rows.scales(), example_rows(bits).scales()));
  }
  ASSERT_EQ(reader.dense_tensors().size(), 1u);
  EXPECT_TRUE(reader.has_dense("norm"));
  EXPECT_FALSE(reader.has_dense("embed"));
  EXPECT_EQ(reader.dense("norm").dtype, "F32");
  EXPECT_TRUE(std::ranges::equal(reader.dense("norm").data, bytes_of("abcdefgh")));
  EXPECT_EQ(reader.metadata("config"), R"({"hidden_size": 75})");
  EXPECT_EQ(reader.file_bytes(), static_cast<int64_t>(fs::file_size(directory / "m")));
  EXPECT_NO_THROW(reader.verify_checksums());
  EXPECT_THROW(reader.dense("embed"), Error);
  EXPECT_THROW(reader.metadata("recipe"), Error);
}

TEST(PackedFile, MatricesOutliveTheReader) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  const StructuredBinaryMatrix matrix = PackedReader::open(directory / "m").linears().at("layers.0.up");
  fs::remove(directory / "m");
  EXPECT_EQ(matrix.at(5, 74), test::random_matrix(kUp, 1).at(5, 74));
}

TEST(PackedFile, SameContentGivesTheSameBytes) {
  const test::ScratchDirectory directory;
  write_example(directory / "a");
  write_example(directory / "b");
  EXPECT_TRUE(test::read_all(directory / "a") == test::read_all(directory / "b"));
}

TEST(PackedFile, NamesTheTensorWhoseBytesChanged) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  const auto file = SafetensorsFile::open(directory / "m");
  for (const auto& [name, tensor] : file->tensors()) {
    const auto offset = tensor.data.data() - file->file()->bytes().data();
    std::fstream stream(directory / "m", std::ios::binary | std::ios::in | std::ios::out);
    const auto original = static_cast<char>(tensor.data[0]);
    // Bit 0 of the first byte: a low bit of a mantissa, a sign bit of a code, another column.
    stream.seekp(offset).put(static_cast<char>(original ^ 1)).flush();
    try {
      PackedReader::open(directory / "m").verify_checksums();
      ADD_FAILURE() << name;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kCorrupt);
      EXPECT_THAT(error.what(), HasSubstr(name.substr(0, name.rfind('.'))));
    }
    stream.seekp(offset).put(original).flush();
  }
  EXPECT_NO_THROW(PackedReader::open(directory / "m").verify_checksums());
}

TEST(PackedFile, IsRefusedWhenTruncatedOrOfAnotherKind) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  fs::resize_file(directory / "m", fs::file_size(directory / "m") - 1);
  EXPECT_THAT(error_of(directory / "m"), HasSubstr("truncated"));

  SafetensorsWriter plain(directory / "plain", false);
  plain.set_metadata("note", R"("stbllm-packed")");
  plain.finish();
  plain.commit();
  EXPECT_THAT(error_of(directory / "plain", ErrorCode::kUnsupported), HasSubstr("not a packed model"));
}

struct Change {
  std::string name;
  std::function<void(Parts&)> apply;
  std::string message;
  ErrorCode code = ErrorCode::kCorrupt;
};

class ChangedPackedFile : public ::testing::TestWithParam<Change> {};

TEST_P(ChangedPackedFile, IsRefused) {
  const test::ScratchDirectory directory;
  write_example(directory / "m");
  rewrite(directory / "m", directory / "same", [](Parts&) {});
  ASSERT_EQ(error_of(directory / "same"), "no error");
  rewrite(directory / "m", directory / "changed", GetParam().apply);
  EXPECT_THAT(error_of(directory / "changed", GetParam().code), HasSubstr(GetParam().message));
}

// Changes a member of the layout of `name` in the metadata `key`.
std::function<void(Parts&)> set_field(const std::string& key, const std::string& name,
                                      const std::string& field, const json& value) {
  return [=](Parts& parts) {
    json layouts = json::parse(parts.metadata[key]);
    layouts[name][field] = value;
    parts.metadata[key] = layouts.dump();
  };
}

INSTANTIATE_TEST_SUITE_P(
    All, ChangedPackedFile,
    ::testing::Values(
        Change{"OtherFormat", [](Parts& p) { p.metadata["format"] = "pt"; }, "not a packed model",
               ErrorCode::kUnsupported},
        Change{"NewerVersion", [](Parts& p) { p.metadata["format_version"] = "2"; },
               "expected format version 1, found 2", ErrorCode::kUnsupported},
        Change{"NoVersion", [](Parts& p) { p.metadata.erase("format_version"); },
               "'format_version' is missing"},
        Change{"NoLinears", [](Parts& p) { p.metadata.erase("linears"); }, "'linears' is missing"},
        Change{"NoQuantizedRows", [](Parts& p) { p.metadata.erase("quantized_rows"); },
               "'quantized_rows' is missing"},
        Change{"LinearsNotJson", [](Parts& p) { p.metadata["linears"] = "{"; },
               "'linears': expected a JSON object"},
        Change{"LayoutNotAnObject", [](Parts& p) { p.metadata["linears"] = R"({"layers.0.up": 3})"; },
               "'layers.0.up': expected an object"},
        Change{"UnknownMember", set_field("linears", "layers.0.up", "zero_points", 1),
               "expected 8 fields, found 9"},
        Change{"MissingMember",
               [](Parts& p) {
                 json layouts = json::parse(p.metadata["linears"]);
                 layouts["layers.0.up"].erase("levels");
                 p.metadata["linears"] = layouts.dump();
               },
               "levels is missing"},
        Change{"NegativeRows", set_field("linears", "layers.0.up", "rows", -6), "rows = -6 must be"},
        Change{"FractionalRows", set_field("linears", "layers.0.up", "rows", 6.0),
               "rows = 6.0 must be an integer"},
        Change{"RowsAbove63Bits", set_field("linears", "layers.0.up", "rows", uint64_t{1} << 63), "rows = "},
        Change{"LevelsAbove31Bits", set_field("linears", "layers.0.up", "levels", (int64_t{1} << 32) + 3),
               "levels = 4294967299 must be an integer"},
        Change{"BadPattern", set_field("linears", "layers.0.up", "nm", "2:5"), "'2:5'"},
        Change{"PatternNotText", set_field("linears", "layers.0.up", "nm", 4), "nm = 4 must be a string"},
        Change{"FourLevels", set_field("linears", "layers.0.up", "levels", 4), "levels in 1..3, found 4"},
        Change{"OtherShape", set_field("linears", "layers.0.up", "rows", 7),
               "'layers.0.up.codes': expected U8 [7,19]"},
        Change{"OtherCoding", set_field("linears", "layers.0.up", "scale_bits", 16),
               "'layers.0.up.scales' is missing"},
        Change{"MissingPlane", [](Parts& p) { p.tensors.erase("layers.0.down.scales"); },
               "'layers.0.down.scales' is missing"},
        Change{"OtherDtype", [](Parts& p) { p.tensors["layers.0.down.codes"].dtype = "I8"; },
               "'layers.0.down.codes': expected U8 [3,9], found I8 [3,9]"},
        Change{"RowsOfFiveBits", set_field("quantized_rows", "embed", "bits", 5), "8 or 4 bits"},
        Change{"RowsOfOtherBits", set_field("quantized_rows", "embed", "bits", 4), "'embed.q4' is missing"},
        Change{"RowsUnknownMember", set_field("quantized_rows", "embed", "block", 64),
               "expected 3 fields, found 4"},
        Change{"RowsNamedAsALinear",
               [](Parts& p) {
                 json layouts = json::parse(p.metadata["quantized_rows"]);
                 layouts["layers.0.down"] = layouts["embed"];
                 p.metadata["quantized_rows"] = layouts.dump();
               },
               "'layers.0.down': both a linear and quantized rows"},
        Change{"RowsWithoutScales", [](Parts& p) { p.tensors.erase("head.row_scales"); },
               "'head.row_scales' is missing"}),
    [](const auto& info) { return info.param.name; });

TEST(PackedWriter, RefusesToSetTheKeysOfTheFormat) {
  const test::ScratchDirectory directory;
  PackedWriter writer(directory / "m", false);
  for (const char* key : {"format", "format_version", "linears", "quantized_rows", "checksums"})
    EXPECT_THROW(writer.set_metadata(key, "{}"), std::logic_error) << key;
}

}  // namespace
}  // namespace stbllm
