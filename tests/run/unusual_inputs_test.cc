// Inputs that are allowed and seldom: the run ends with a file that means what the quantizer computed, or
// with one sentence.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>

#include "stbllm/base/safetensors.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/run/quantize_model.h"
#include "support/calibration_text.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

/// One preset of each kind of method, and one whose codes come from a budget.
const std::vector<std::string> kPresets = {"rtn", "stbllm-paper", "stbllm", "stbllm-2bit"};

class UnusualInputs : public testing::Test {
 protected:
  UnusualInputs() { test::write_checkpoint(checkpoint_, test::tiny_llama()); }

  /// Rewrites a tensor of the checkpoint, which is in float32.
  void change(const std::string& name, const std::function<void(at::Tensor&)>& edit) const {
    const fs::path path = checkpoint_ / "model.safetensors";
    const auto file = SafetensorsFile::open(path);
    SafetensorsWriter writer(scratch_ / "changed", /*force=*/true);
    for (const auto& [other, entry] : file->tensors()) {
      at::Tensor values =
          at::from_blob(const_cast<std::byte*>(entry.data.data()), entry.shape, at::kFloat).clone();
      if (other == name) edit(values);
      writer.add(other, "F32", entry.shape, bytes_of(values));
    }
    writer.finish();
    writer.commit();
    fs::rename(scratch_ / "changed", path);
  }
  QuantizeResult quantize(const std::string& preset, const std::string& text) const {
    QuantizeOptions options;
    options.output = output_;
    options.force = true;
    const Checkpoint checkpoint = Checkpoint::open(checkpoint_);
    return quantize_model(checkpoint, make_calibration(checkpoint, text, 8, 0, 32, 0), Recipe::load(preset),
                          options);
  }
  void expect_a_sound_file(const std::string& text) const {
    for (const std::string& preset : kPresets) {
      SCOPED_TRACE(preset);
      // Packed and dense logits differ by the order of float32 sums alone.
      EXPECT_NO_THROW(EXPECT_LT(quantize(preset, text).verified_logits, 1e-4));
      const PackedReader reader = PackedReader::open(output_);
      reader.verify_checksums();
      for (const auto& [name, matrix] : reader.linears())
        EXPECT_TRUE(unpack_dense(matrix).isfinite().all().item<bool>()) << name;
    }
  }
  std::string text() const { return test::write_calibration_text(scratch_.path()); }

  test::ScratchDirectory scratch_;
  const fs::path checkpoint_ = scratch_ / "checkpoint", output_ = scratch_ / "packed";
};

TEST_F(UnusualInputs, ATextOfOneTokenMakesHessiansOfRankOne) {
  const fs::path text = scratch_ / "one.txt";
  std::ofstream(text) << std::string(4000, 'x');
  expect_a_sound_file(text);
}

TEST_F(UnusualInputs, ColumnsWhoseInputsAreAlwaysZero) {
  change("model.layers.0.input_layernorm.weight", [](at::Tensor& norm) { norm.slice(0, 3, 40).zero_(); });
  change("model.layers.1.post_attention_layernorm.weight", [](at::Tensor& norm) { norm.zero_(); });
  expect_a_sound_file(text());
}

TEST_F(UnusualInputs, RowsAndLinearsThatAreZero) {
  change("model.layers.0.mlp.up_proj.weight", [](at::Tensor& weight) { weight.slice(0, 5, 90).zero_(); });
  change("model.layers.1.self_attn.v_proj.weight", [](at::Tensor& weight) { weight.zero_(); });
  expect_a_sound_file(text());
}

TEST_F(UnusualInputs, ACheckpointOfLinksAsDownloadsLeaveIt) {
  const fs::path blobs = scratch_ / "blobs";
  fs::create_directory(blobs);
  for (const std::string& name : test::list(checkpoint_)) {
    fs::rename(checkpoint_ / name, blobs / name);
    fs::create_symlink(fs::path("../blobs") / name, checkpoint_ / name);
  }
  expect_a_sound_file(text());
}

TEST_F(UnusualInputs, ActivationsBeyondFloat32AreRefusedByNameOfTheirBlock) {
  change("model.layers.1.mlp.up_proj.weight", [](at::Tensor& weight) { weight.fill_(3e38f); });
  for (const std::string& preset : kPresets) {
    SCOPED_TRACE(preset);
    test::expect_error(ErrorCode::kCorrupt, "not finite", [&] { quantize(preset, text()); });
    EXPECT_FALSE(fs::exists(output_));
  }
}

}  // namespace
}  // namespace stbllm
