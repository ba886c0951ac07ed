// A model on the test device: evaluation and generation give what the CPU gives, and little crosses.

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "stbllm/backend/backend.h"
#include "stbllm/calibrate/calibration.h"
#include "stbllm/eval/divergence.h"
#include "stbllm/eval/generate.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/run/quantize_model.h"
#include "support/calibration_text.h"
#include "support/recipes.h"
#include "support/scratch_directory.h"
#include "support/test_device.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using test::test_device;
using test::Transfers;
using test::transfers;

constexpr int64_t kSeqlen = 48;   // more than Mistral's window of 16
constexpr int64_t kWindows = 50;  // of which 42 pass through a block together

/// Packed products of the test device: those of the reference, which reads and writes the device's pages.
class TestDeviceBackend : public Backend {
 public:
  std::string_view name() const override { return "test-device"; }
  std::string_view device() const override { return test::kTestDevice; }
  std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const override {
    return reference().prepare(matrix);
  }
  std::unique_ptr<PreparedMatrix> prepare_rows(const QuantizedRows& rows) const override {
    return reference().prepare_rows(rows);
  }
  void matmul(const PreparedMatrix& matrix, const ActivationView& x, const ActivationView& y,
              void* stream) const override {
    const test::DeviceAccess open_x(x.data), open_y(y.data);
    reference().matmul(matrix, x, y, stream);
  }

 private:
  static const Backend& reference() { return find_backend("reference"); }
};

Windows some_windows(int64_t vocab) {
  Windows windows(kWindows, std::vector<int32_t>(kSeqlen));
  uint64_t seed = 1;
  for (auto& window : windows)
    for (int32_t& id : window) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;  // Knuth's MMIX generator
      id = static_cast<int32_t>((seed >> 33) % static_cast<uint64_t>(vocab));
    }
  return windows;
}

/// Both decoders compute in float32, with loops of this program on the CPU and with operations of libtorch on
/// the device. They round each number to parts in 2^24, of which the few hundred additions behind an output
/// leave less than 1e-5.
constexpr double kRounding = 1e-5;

void expect_same_evaluation(const Decoder& device, const Decoder& host) {
  ASSERT_EQ(device.device().type(), test_device().type());
  const Windows windows = some_windows(host.spec().vocab);
  const Perplexity expected = evaluate_perplexity(host, windows);
  evaluate_perplexity(device, windows);  // blocks are there from now on
  const Transfers before = transfers();
  const Perplexity found = evaluate_perplexity(device, windows);
  const Transfers crossed = transfers() - before;
  for (int64_t w = 0; w < kWindows; ++w)
    EXPECT_NEAR(found.window_nll[w], expected.window_nll[w], kRounding * expected.window_nll[w]);
  // The angles of rotary positions once, the ids of 42 and of 8 windows, and for each window what it should
  // predict. The losses of each window come back together.
  EXPECT_LE(crossed.to_device, 1 + 2 + kWindows);
  EXPECT_EQ(crossed.to_host, kWindows);
  EXPECT_EQ(crossed.waits, kWindows);

  const Decoder* const models[] = {&host};
  const Divergence divergence = evaluate_divergence(device, models, windows);
  EXPECT_LT(std::abs(divergence.models[0].mean_kl), kRounding);
  // Two tokens may be equally likely to rounding, which must be rare.
  EXPECT_GT(divergence.models[0].top1_agreement, 0.99);
}

void expect_same_generation(const Decoder& device, const Decoder& host) {
  constexpr int64_t kTokens = 24;  // beyond the attention window of 16
  const std::vector<int32_t> prompt = {0, 17, 230, 45, 99};
  const GenerateOptions options{.max_tokens = kTokens};
  const Generation expected = generate(host, prompt, options);
  generate(device, prompt, options);
  const Transfers before = transfers();
  const Generation found = generate(device, prompt, options);
  const Transfers crossed = transfers() - before;
  EXPECT_EQ(found.ids, expected.ids);
  ASSERT_EQ(std::ssize(found.ids), kTokens);
  // There go the id and the angles of its position, and the logits come back.
  EXPECT_LE(crossed.to_device, 2 * kTokens);
  EXPECT_EQ(crossed.to_host, kTokens);
  EXPECT_EQ(crossed.waits, kTokens);
}

struct Named {
  std::string name;
  test::TinyModel model;
};
class DeviceModel : public testing::TestWithParam<Named> {
 protected:
  DeviceModel() { test::write_checkpoint(scratch_ / "checkpoint", GetParam().model); }
  Checkpoint checkpoint() const { return Checkpoint::open(scratch_ / "checkpoint"); }

  test::ScratchDirectory scratch_;
};
INSTANTIATE_TEST_SUITE_P(Models, DeviceModel,
                         testing::Values(Named{"llama", test::tiny_llama()},
                                         Named{"mistral", test::tiny_mistral()},
                                         Named{"opt", test::tiny_opt()}, Named{"qwen3", test::tiny_qwen3()}),
                         [](const auto& info) { return info.param.name; });

TEST_P(DeviceModel, DenseDoesWhatTheCpuDoes) {
  const Decoder host = Decoder::from_checkpoint(checkpoint(), {.keep_blocks = true}),
                device =
                    Decoder::from_checkpoint(checkpoint(), {.device = test_device(), .keep_blocks = true});
  expect_same_evaluation(device, host);
  expect_same_generation(device, host);
}

/// With tables as integers, which are looked up on the host: the rows cross in place of the ids.
TEST_P(DeviceModel, PackedDoesWhatTheCpuDoes) {
  const std::string text = test::write_calibration_text(scratch_.path());
  QuantizeOptions options;
  options.output = scratch_ / "packed.safetensors";
  quantize_model(checkpoint(), make_calibration(checkpoint(), text, 8, 0, kSeqlen, /*seed=*/0),
                 test::with_scheme("stbllm-1bit", {.nm = {2, 4}, .levels = 1}), options);
  const PackedReader reader = PackedReader::open(options.output);
  const TestDeviceBackend backend;
  const Decoder host = Decoder::from_packed(reader, find_backend("reference")),
                device = Decoder::from_packed(reader, backend);
  expect_same_evaluation(device, host);
  expect_same_generation(device, host);
}

}  // namespace
}  // namespace stbllm
