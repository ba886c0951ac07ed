// The examples of FORMAT.md are what the implementation does.

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "stbllm/pack/structured_binary_matrix.h"
#include "support/random_matrix.h"

namespace stbllm {
namespace {

// The lines of an example, by their first word or, for "row 0", by their first two words.
using Example = std::map<std::string, std::string>;

std::vector<Example> read_examples() {
  std::ifstream file(STBLLM_SOURCE_DIR "/src/pack/FORMAT.md");
  std::vector<Example> examples;
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    if (line == "```text") examples.emplace_back();
    if (line.starts_with("```")) {
      inside = line == "```text";
    } else if (inside) {
      const size_t name_end = line.find(' ', line.starts_with("row ") ? 4 : 0);
      examples.back()[line.substr(0, name_end)] = line.substr(name_end);
    }
  }
  return examples;
}

Layout layout_of(const Example& example) {
  const auto json = nlohmann::json::parse(example.at("layout"));
  return {.rows = json["rows"],
          .cols = json["cols"],
          .nm = NmPattern::parse(json["nm"].get<std::string>()),
          .levels = json["levels"],
          .column_block = json["column_block"],
          .scale_bits = json["scale_bits"],
          .salient = json["salient"],
          .outliers = json["outliers"]};
}

test::OwnedPlanes planes_of(const Example& example) {
  test::OwnedPlanes planes;
  for (int i = 0; i < kPlaneCount; ++i) {
    const auto line = example.find(std::string(plane_name(static_cast<Plane>(i))));
    if (line == example.end()) continue;
    std::istringstream hex(line->second);
    for (unsigned byte; hex >> std::hex >> byte;) planes.bytes[i].push_back(static_cast<std::byte>(byte));
  }
  return planes;
}

TEST(FormatExamples, DecodeToTheirRows) {
  const auto examples = read_examples();
  ASSERT_EQ(examples.size(), 2u);
  for (const Example& example : examples) {
    const Layout layout = layout_of(example);
    const StructuredBinaryMatrix matrix = planes_of(example).matrix(layout);
    for (int64_t row = 0; row < layout.rows; ++row) {
      std::istringstream values(example.at("row " + std::to_string(row)));
      for (int64_t col = 0; col < layout.cols; ++col) {
        float expected;
        ASSERT_TRUE(values >> expected);
        EXPECT_EQ(matrix.at(row, col), expected) << "row " << row << " column " << col;
      }
    }
  }
}

TEST(FormatExamples, FirstGroupEncodesAsTheTextSays) {
  GroupSymbols symbols;
  symbols.position = {0, 3};
  symbols.sign = {0, 1};
  EXPECT_EQ(encode_group({2, 4}, 1, symbols), 14u);
  symbols.level = {1, 0};
  EXPECT_EQ(encode_group({2, 4}, 2, symbols), 54u);
}

}  // namespace
}  // namespace stbllm
