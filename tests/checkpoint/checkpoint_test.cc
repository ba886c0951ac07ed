#include "stbllm/checkpoint/checkpoint.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "stbllm/base/error.h"
#include "support/expect_error.h"
#include "support/scratch_directory.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::ScratchDirectory;
using test::TinyModel;
using test::write_text;

const std::string kEmbedding = "model.embed_tokens.weight";

nlohmann::json read_json(const fs::path& path) { return nlohmann::json::parse(std::ifstream(path)); }

TinyModel sharded_llama() {
  TinyModel model = test::tiny_llama();
  model.shards = 3;
  return model;
}

/// The tensors of `model` as test::write_checkpoint() wrote them.
void expect_holds(const Checkpoint& checkpoint, const TinyModel& model) {
  const auto shapes = test::tensor_shapes(model.config);
  for (const auto& [name, shape] : shapes) {
    const at::Tensor loaded = checkpoint.load(name, shape);
    std::vector<float> values = test::tensor_values(name, shape, model.seed);
    const at::Tensor expected = at::from_blob(values.data(), shape, at::kFloat).to(loaded.scalar_type());
    EXPECT_TRUE(at::equal(loaded, expected)) << name;
  }
}

TEST(Checkpoint, ReadsEveryArchitectureOfTheTests) {
  for (const TinyModel& model :
       {test::tiny_llama(), test::tiny_mistral(), test::tiny_opt(), test::tiny_opt_350m()}) {
    const ScratchDirectory directory;
    test::write_checkpoint(directory.path(), model);
    const Checkpoint checkpoint = Checkpoint::open(directory.path());
    EXPECT_EQ(checkpoint.config()["architectures"], model.config["architectures"]);
    expect_holds(checkpoint, model);
  }
}

TEST(Checkpoint, LoadsTheDtypeOfTheFile) {
  const std::vector<std::pair<std::string, at::ScalarType>> dtypes = {
      {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}};
  for (const auto& [name, dtype] : dtypes) {
    const ScratchDirectory directory;
    TinyModel model = test::tiny_llama();
    model.dtype = name;
    test::write_checkpoint(directory.path(), model);
    const Checkpoint checkpoint = Checkpoint::open(directory.path());
    EXPECT_EQ(checkpoint.load(kEmbedding, checkpoint.shape(kEmbedding)).scalar_type(), dtype);
    expect_holds(checkpoint, model);
  }
}

TEST(Checkpoint, RefusesOtherDtypesByName) {
  const ScratchDirectory directory;
  write_text(directory / "config.json", "{}");
  SafetensorsWriter writer(directory / "model.safetensors", false);
  const std::vector<int64_t> values = {1, 2};
  writer.add("steps", "I64", {2}, std::as_bytes(std::span(values)));
  writer.finish();
  writer.commit();
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  expect_error(ErrorCode::kUnsupported, "tensor steps has dtype I64", [&] { checkpoint.load("steps", {2}); });
}

TEST(Checkpoint, ShardsHoldWhatOneFileHolds) {
  const ScratchDirectory directory;
  test::write_checkpoint(directory.path(), sharded_llama());
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  expect_holds(checkpoint, sharded_llama());
}

TEST(Checkpoint, ReadsShardsOfTorchSave) {
  const ScratchDirectory directory;
  write_text(directory / "config.json", "{}");
  fs::copy(fs::path(STBLLM_SOURCE_DIR) / "tests/golden/state_dict.bin",
           directory / "pytorch_model-00001-of-00001.bin");
  write_text(directory / "pytorch_model.bin.index.json",
             R"({"weight_map": {"base": "pytorch_model-00001-of-00001.bin"}})");
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  EXPECT_EQ(checkpoint.load("base", {4, 6})[3][5].item<float>(), 23 / 4.f);
}

TEST(Checkpoint, PrefersSafetensors) {
  const ScratchDirectory directory;
  test::write_checkpoint(directory.path(), test::tiny_llama());
  write_text(directory / "pytorch_model.bin", "not looked at");
  EXPECT_TRUE(Checkpoint::open(directory.path()).contains(kEmbedding));
}

TEST(Checkpoint, LoadsViewsThatOutliveItAndTheirRelease) {
  const ScratchDirectory directory;
  test::write_checkpoint(directory.path(), test::tiny_llama());
  at::Tensor tensor;
  {
    const Checkpoint checkpoint = Checkpoint::open(directory.path());
    tensor = checkpoint.load(kEmbedding, checkpoint.shape(kEmbedding));
    EXPECT_EQ(tensor.data_ptr(), checkpoint.load(kEmbedding, checkpoint.shape(kEmbedding)).data_ptr());
    checkpoint.release(kEmbedding);
  }
  EXPECT_EQ(tensor[0][0].item<float>(), test::tensor_values(kEmbedding, {test::kTinyVocabSize, 64}, 0)[0]);
}

TEST(Checkpoint, NamesAMissingTensorAndAWrongShape) {
  const ScratchDirectory directory;
  test::write_checkpoint(directory.path(), test::tiny_llama());
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  expect_error(ErrorCode::kMismatch, "tensor model.extra is missing",
               [&] { checkpoint.load("model.extra", {1}); });
  expect_error(ErrorCode::kMismatch, "model.norm.weight: expected shape [32, 2], found [64]", [&] {
    checkpoint.load("model.norm.weight", {32, 2});
  });
}

TEST(Checkpoint, SaysWhatADirectoryLacks) {
  const ScratchDirectory directory;
  expect_error(ErrorCode::kNotFound, "no such directory", [&] { Checkpoint::open(directory / "absent"); });
  expect_error(ErrorCode::kNotFound, "no config.json", [&] { Checkpoint::open(directory.path()); });
  write_text(directory / "config.json", "{]");
  expect_error(ErrorCode::kCorrupt, "not JSON", [&] { Checkpoint::open(directory.path()); });
  write_text(directory / "config.json", "[]");
  expect_error(ErrorCode::kCorrupt, "expected a JSON object", [&] { Checkpoint::open(directory.path()); });
  write_text(directory / "config.json", "{}");
  expect_error(ErrorCode::kNotFound, "neither model.safetensors nor pytorch_model.bin",
               [&] { Checkpoint::open(directory.path()); });
  expect_error(ErrorCode::kNotFound, "found a file", [&] { Checkpoint::open(directory / "config.json"); });
  write_text(directory / "model.safetensors",
             "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  expect_error(ErrorCode::kCorrupt, "git lfs pull", [&] { Checkpoint::open(directory.path()); });
}

class DamagedShards : public testing::Test {
 protected:
  DamagedShards() { test::write_checkpoint(directory_.path(), sharded_llama()); }

  void edit_index(const std::function<void(nlohmann::json&)>& edit) {
    nlohmann::json index = read_json(directory_ / kIndex);
    edit(index);
    write_text(directory_ / kIndex, index.dump());
  }
  void expect_refused(ErrorCode code, const std::string& part_of_message) {
    expect_error(code, part_of_message, [&] { Checkpoint::open(directory_.path()); });
  }

  const std::string kIndex = "model.safetensors.index.json", kSecond = "model-00002-of-00003.safetensors";
  ScratchDirectory directory_;
};

TEST_F(DamagedShards, MissingShard) {
  fs::remove(directory_ / kSecond);
  expect_refused(ErrorCode::kNotFound, kSecond + ": this file of the checkpoint is missing");
}

TEST_F(DamagedShards, TruncatedShardIsFoundWhenItOpens) {
  fs::resize_file(directory_ / kSecond, fs::file_size(directory_ / kSecond) - 1);
  expect_refused(ErrorCode::kCorrupt, kSecond);
}

TEST_F(DamagedShards, TensorThatIsNotInItsShard) {
  edit_index([&](nlohmann::json& index) { index["weight_map"]["model.extra"] = kSecond; });
  expect_refused(ErrorCode::kMismatch, "tensor model.extra should be in " + kSecond);
}

TEST_F(DamagedShards, TensorInAnotherShardThanTheIndexSays) {
  edit_index([&](nlohmann::json& index) { index["weight_map"]["lm_head.weight"] = kSecond; });
  expect_refused(ErrorCode::kMismatch, "tensor lm_head.weight should be in " + kSecond);
}

TEST_F(DamagedShards, TensorInTwoShards) {
  fs::copy(directory_ / kSecond, directory_ / "copy.safetensors");
  edit_index([&](nlohmann::json& index) { index["weight_map"]["model.extra"] = "copy.safetensors"; });
  expect_refused(ErrorCode::kMismatch, "is in two files");
}

TEST_F(DamagedShards, ShardOutsideTheDirectory) {
  for (const char* outside : {"../model.safetensors", "/etc/passwd", "..", ".", "", "a/../b", "sub/"}) {
    edit_index([&](nlohmann::json& index) { index["weight_map"][kEmbedding] = outside; });
    expect_refused(ErrorCode::kCorrupt, "expected the name of a file beside the index");
  }
}

TEST_F(DamagedShards, IndexWithoutTensors) {
  edit_index([&](nlohmann::json& index) { index["weight_map"] = nlohmann::json::object(); });
  expect_refused(ErrorCode::kCorrupt, "weight_map");
  write_text(directory_ / kIndex, R"({"weight_map": {"a": 1}})");
  expect_refused(ErrorCode::kCorrupt, "expected the name of a file beside the index, found 1");
  write_text(directory_ / kIndex, "{");
  expect_refused(ErrorCode::kCorrupt, "not JSON");
}

TEST(TinyCheckpoint, DependsOnTheSeedAlone) {
  const std::vector<int64_t> shape = {4, 8};
  EXPECT_EQ(test::tensor_values("a", shape, 1), test::tensor_values("a", shape, 1));
  EXPECT_NE(test::tensor_values("a", shape, 1), test::tensor_values("a", shape, 2));
  EXPECT_NE(test::tensor_values("a", shape, 1), test::tensor_values("b", shape, 1));
}

}  // namespace
}  // namespace stbllm
