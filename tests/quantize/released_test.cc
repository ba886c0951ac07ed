// The recipe "stbllm-released" against what the released Python code makes of three layers (shared reference
// tensors).
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "stbllm/base/safetensors.h"
#include "stbllm/quantize/nm_select.h"
#include "stbllm/quantize/quantize_linear.h"

namespace stbllm {
namespace {

const std::filesystem::path kReference =
    std::filesystem::path(STBLLM_SOURCE_DIR) / "../shared/reference/quantizer";

at::Tensor tensor_of(const SafetensorsFile& file, const std::string& name) {
  const TensorEntry& entry = file.tensors().at(name);
  const auto type = entry.dtype == "U8" ? at::kByte : at::kFloat;
  return at::from_blob(const_cast<std::byte*>(entry.data.data()), entry.shape, type).clone();
}

class ReleasedArithmetic : public ::testing::TestWithParam<const char*> {};

TEST_P(ReleasedArithmetic, GivesTheSameSalientColumnsThresholdsAndWeights) {
  if (!std::filesystem::exists(kReference)) GTEST_SKIP() << "the shared reference tensors are not here";
  const auto file = SafetensorsFile::open(kReference / (std::string(GetParam()) + ".safetensors"));
  std::ifstream expected_file(kReference / "expected.json");
  nlohmann::json expected;
  for (const auto& entry : nlohmann::json::parse(expected_file))
    if (entry["name"] == GetParam()) expected = entry;
  ASSERT_FALSE(expected.is_null());

  InputStats stats;
  stats.hessian = tensor_of(*file, "hessian");
  stats.tokens = 2;  // feature norms are checked through the mask below; here only H matters
  const at::Tensor weight =
      tensor_of(*file, "pruned_weight");  // the released code prunes in a pass of its own
  Recipe recipe = Recipe::load("stbllm-released");
  recipe.nm = {8, 8};  // already pruned: keep everything
  LinearReport report;
  const BinarizedWeight result = quantize_linear(weight, stats, recipe, &report);

  const auto& blocks = expected["blocks"];
  ASSERT_EQ(report.salient_count.size(), blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    EXPECT_EQ(report.salient_count[b], static_cast<int>(blocks[b]["salient_columns"].size()))
        << "block " << b;
    // p1 is a quantile of W^2 / d^2: it carries the float32 rounding of the inverse factor, squared.
    EXPECT_NEAR(report.threshold[b] / blocks[b]["p1"].get<double>(), 1.0, 2e-5) << "block " << b;
  }
  const at::Tensor wanted = tensor_of(*file, "dequantized"), got = result.to_dense();
  // Same sign and same set for every weight: a wrong one is off by the size of a scale. The rest is float32
  // rounding, which grows with the compensation from block to block (2e-5 of the mean weight seen in the last
  // one).
  EXPECT_LT(((wanted - got).abs().max() / wanted.abs().mean()).item<double>(), 1e-4);
  EXPECT_LT(((wanted - got).norm() / wanted.norm()).item<double>(), 1e-5);
}

TEST_P(ReleasedArithmetic, GivesTheSameNmMask) {
  if (!std::filesystem::exists(kReference)) GTEST_SKIP() << "the shared reference tensors are not here";
  const auto file = SafetensorsFile::open(kReference / (std::string(GetParam()) + ".safetensors"));
  const at::Tensor weight = tensor_of(*file, "weight"), kept = tensor_of(*file, "kept");
  const at::Tensor norm_sq = tensor_of(*file, "feature_norm_sq");
  const at::Tensor score = ImportanceScore(weight.t().contiguous(), Importance::kRia)(
      weight.t().contiguous(), norm_sq, at::ones_like(norm_sq));
  const at::Tensor wanted = tensor_of(*file, "importance");
  EXPECT_LT(((score.t() - wanted).abs() - 1e-5 * wanted.abs()).max().item<double>(), 1e-12);
  const int keep = std::string(GetParam()).find("6of8") != std::string::npos ? 6 : 4;
  const at::Tensor mask = nm_mask(score.contiguous(), {keep, 8}).t();
  // Where weights of a group are zero, all masks that keep the others are equal in value.
  EXPECT_TRUE(at::equal(mask * weight.ne(0), kept * weight.ne(0)));
  EXPECT_TRUE(mask.reshape({weight.size(0), -1, 8}).sum(2).eq(keep).all().item<bool>());
}

INSTANTIATE_TEST_SUITE_P(Layers, ReleasedArithmetic,
                         ::testing::Values("synthetic_48x256_4of8", "smollm2_l3_kproj_192x576_6of8",
                                           "smollm2_l3_vproj_192x576_4of8"));

}  // namespace
}  // namespace stbllm
