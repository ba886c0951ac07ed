// The recipe "stbllm-released" against the released arithmetic: on a synthetic layer, as
// tests/golden/make_released.py computes it in numpy, and on three layers that the released Python code
// itself quantized, where ../shared is.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "stbllm/base/safetensors.h"
#include "stbllm/quantize/nm_select.h"
#include "stbllm/quantize/quantize_linear.h"
#include "stbllm/recipe/recipe.h"

namespace stbllm {
namespace {

const std::filesystem::path kRoot = STBLLM_SOURCE_DIR;

/// A layer NAME.safetensors beside expected.json, in a directory relative to the source root.
struct Layer {
  const char* directory;
  const char* name;
};
void PrintTo(const Layer& layer, std::ostream* out) { *out << layer.name; }

constexpr const char* kGolden = "tests/golden/released";
constexpr const char* kShared = "../shared/reference/quantizer";

at::Tensor tensor_of(const SafetensorsFile& file, const std::string& name) {
  const TensorEntry& entry = file.tensors().at(name);
  const auto type = entry.dtype == "U8" ? at::kByte : entry.dtype == "F16" ? at::kHalf : at::kFloat;
  const at::Tensor tensor = at::from_blob(const_cast<std::byte*>(entry.data.data()), entry.shape, type);
  return tensor.to(type == at::kByte ? at::kByte : at::kFloat, /*non_blocking=*/false, /*copy=*/true);
}

class ReleasedArithmetic : public ::testing::TestWithParam<Layer> {
 protected:
  void SetUp() override {
    const std::filesystem::path directory = kRoot / GetParam().directory;
    file_ = SafetensorsFile::open(directory / (std::string(GetParam().name) + ".safetensors"));
    std::ifstream expected(directory / "expected.json");
    for (const auto& entry : nlohmann::json::parse(expected))
      if (entry["name"] == GetParam().name) expected_ = entry;
    ASSERT_FALSE(expected_.is_null());
  }
  at::Tensor tensor(const std::string& name) const { return tensor_of(*file_, name); }

  std::shared_ptr<const SafetensorsFile> file_;
  nlohmann::json expected_;
};

TEST_P(ReleasedArithmetic, GivesTheSameSalientColumnsThresholdsAndWeights) {
  InputStats stats;
  stats.hessian = tensor("hessian");
  stats.tokens = 2;  // feature norms are checked through the mask below; here only H matters
  const at::Tensor weight = tensor("pruned_weight");  // the released code prunes in a pass of its own
  const Method method = Recipe::load("stbllm-released").method;
  const LinearPlan plan{.scheme = {.nm = {8, 8}, .levels = 3}};  // already pruned: keep everything
  LinearReport report;
  const BinarizedWeight result = quantize_linear(weight, stats, method, plan, &report);

  const auto& blocks = expected_["blocks"];
  ASSERT_EQ(report.salient_count.size(), blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    EXPECT_EQ(report.salient_count[b], static_cast<int>(blocks[b]["salient_columns"].size()))
        << "block " << b;
    // p1 is a quantile of W^2 / d^2: it carries the float32 rounding of the inverse factor, squared.
    EXPECT_NEAR(report.threshold[b] / blocks[b]["p1"].get<double>(), 1.0, 2e-5) << "block " << b;
  }
  const at::Tensor wanted = tensor("dequantized"), got = result.to_dense();
  // Same sign and same set for every weight: a wrong one is off by the size of a scale. The rest is float32
  // rounding, which grows with the compensation from block to block (2e-5 of the mean weight seen in the last
  // one).
  EXPECT_LT(((wanted - got).abs().max() / wanted.abs().mean()).item<double>(), 1e-4);
  EXPECT_LT(((wanted - got).norm() / wanted.norm()).item<double>(), 1e-5);
}

TEST_P(ReleasedArithmetic, GivesTheSameNmMask) {
  const at::Tensor weight = tensor("weight"), kept = tensor("kept");
  const at::Tensor norm_sq = tensor("feature_norm_sq");
  const at::Tensor score = ImportanceScore(weight.t().contiguous(), Importance::kRia)(
      weight.t().contiguous(), norm_sq, at::ones_like(norm_sq));
  const at::Tensor wanted = tensor("importance");
  EXPECT_LT(((score.t() - wanted).abs() - 1e-5 * wanted.abs()).max().item<double>(), 1e-12);
  const int keep = expected_["keep"];
  const at::Tensor mask = nm_mask(score.contiguous(), {keep, 8}).t();
  // Where weights of a group are zero, all masks that keep the others are equal in value.
  EXPECT_TRUE(at::equal(mask * weight.ne(0), kept * weight.ne(0)));
  EXPECT_TRUE(mask.reshape({weight.size(0), -1, 8}).sum(2).eq(keep).all().item<bool>());
}

std::vector<Layer> layers() {
  std::vector<Layer> result = {{kGolden, "synthetic_32x192_4of8"}};
  if (std::filesystem::exists(kRoot / kShared))
    for (const char* name :
         {"synthetic_48x256_4of8", "smollm2_l3_kproj_192x576_6of8", "smollm2_l3_vproj_192x576_4of8"})
      result.push_back({kShared, name});
  return result;
}

INSTANTIATE_TEST_SUITE_P(Layers, ReleasedArithmetic, ::testing::ValuesIn(layers()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace stbllm
