// A packed file against the dense model of the weights it stands for.

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <stdexcept>

#include "stbllm/base/error.h"
#include "stbllm/model/decoder.h"
#include "stbllm/model/torch_cuda.h"
#include "support/random_matrix.h"
#include "support/scratch_directory.h"
#include "support/threads.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

using test::ScratchDirectory;
using test::TinyModel;

class PackedDecoder : public testing::Test {
 protected:
  /// Every linear of `model` as a random packed matrix except block 1's o_proj, which stays dense; the
  /// embedding as quantized rows of 8 bits; all else as float32. `skip` is left out, linears get `extra_rows`
  /// more rows.
  PackedReader pack(const TinyModel& model, const std::string& skip = "", int64_t extra_rows = 0) {
    const ModelSpec spec = ModelSpec::from_config(model.config);
    PackedWriter writer(path_, /*force=*/true);
    writer.set_metadata("config", model.config.dump());
    for (int64_t block = 0; block < spec.layers; ++block)
      for (const LinearSpec& linear : spec.linears(block)) {
        const Layout layout{.rows = linear.rows + extra_rows, .cols = linear.cols, .nm = {2, 4}};
        if (linear.role == Role::kO && block == 1) {
          add_dense(writer, linear.weight());
        } else if (linear.name != skip) {
          writer.add_linear(linear.name, test::random_matrix(layout, seed_of(linear)));
        }
      }
    for (const TensorSpec& tensor : spec.other_tensors()) {
      if (tensor.name == skip) continue;
      tensor.name == spec.embedding().name ? add_rows(writer, tensor) : add_dense(writer, tensor);
    }
    writer.finish();
    writer.commit();
    return PackedReader::open(path_);
  }

  /// Every linear in a code of its own: levels, coded and other scales, outlier and salient columns.
  PackedReader pack_codes(const TinyModel& model) {
    const ModelSpec spec = ModelSpec::from_config(model.config);
    PackedWriter writer(path_, /*force=*/true);
    writer.set_metadata("config", model.config.dump());
    for (int64_t block = 0; block < spec.layers; ++block)
      for (const LinearSpec& linear : spec.linears(block)) {
        Layout layout{.rows = linear.rows, .cols = linear.cols, .nm = {2, 4}};
        switch ((static_cast<int>(linear.role) + block) % 4) {
          case 0:
            layout.levels = 3, layout.scale_bits = 4, layout.outliers = 2;
            break;
          case 1:
            layout.nm = {3, 8}, layout.scale_bits = 5;
            break;
          case 2:
            layout.nm = {4, 8}, layout.levels = 3, layout.salient = 5;
            break;
          default:
            break;
        }
        writer.add_linear(linear.name, test::random_matrix(layout, seed_of(linear)));
      }
    for (const TensorSpec& tensor : spec.other_tensors()) add_dense(writer, tensor);
    writer.finish();
    writer.commit();
    return PackedReader::open(path_);
  }

  static uint64_t seed_of(const LinearSpec& linear) { return std::hash<std::string>()(linear.name); }

  void add_dense(PackedWriter& writer, const TensorSpec& tensor) {
    const std::vector<std::byte> bytes =
        test::encode(test::tensor_values(tensor.name, tensor.shape, 0), "F32");
    writer.add_dense(tensor.name, "F32", tensor.shape, bytes);
  }

  /// Values that 8-bit rows hold exactly: multiples of 2^-7, 127 of them the largest of every row.
  void add_rows(PackedWriter& writer, const TensorSpec& tensor) {
    const at::Tensor values = embedding(tensor.shape);
    const QuantizedRows rows = QuantizedRows::encode(
        {.rows = tensor.shape[0], .cols = tensor.shape[1], .bits = 8},
        [&](int64_t row, float* out) {
          std::memcpy(out, values[row].data_ptr<float>(),
                      static_cast<size_t>(tensor.shape[1]) * sizeof(float));
        },
        tensor.name);
    writer.add_quantized_rows(tensor.name.substr(0, tensor.name.rfind('.')), rows);
  }
  static at::Tensor embedding(const std::vector<int64_t>& shape) {
    at::Tensor values = (at::arange(shape[0] * shape[1]) * 37 % 255 - 127).to(at::kFloat).view(shape) / 128;
    values.slice(1, 0, 1).fill_(127.0 / 128);
    return values;
  }

  /// The dense model with the same weights, made without any packed file.
  Decoder dense(const TinyModel& model) {
    const ScratchDirectory directory;
    test::write_checkpoint(directory.path(), model);
    const Decoder decoder =
        Decoder::from_checkpoint(Checkpoint::open(directory.path()), {.keep_blocks = true});
    for (int64_t index = 0; index < decoder.spec().layers; ++index)
      for (const LinearSpec& linear : decoder.block(index)->linears()) {
        if (linear.role == Role::kO && index == 1) continue;
        const StructuredBinaryMatrix matrix =
            test::random_matrix({.rows = linear.rows, .cols = linear.cols, .nm = {2, 4}}, seed_of(linear));
        const at::Tensor weight = at::empty({linear.rows, linear.cols});
        for (int64_t row = 0; row < linear.rows; ++row) matrix.decode_row(row, weight[row].data_ptr<float>());
        const at::Tensor bias = decoder.block(index)->dense(linear.role).bias();
        decoder.block(index)->set_linear(linear.role, std::make_unique<DenseLinear>(weight, bias));
      }
    return decoder;
  }

  void expect_mismatch(const PackedReader& packed, const std::vector<std::string>& words) {
    try {
      Decoder::from_packed(packed, find_backend("reference"));
      FAIL() << "accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kMismatch);
      for (const std::string& word : words) EXPECT_THAT(error.what(), testing::HasSubstr(word));
    }
  }

  ScratchDirectory directory_;
  const std::filesystem::path path_ = directory_ / "model.safetensors";
};

TEST_F(PackedDecoder, EqualsTheDenseModelOfItsWeights) {
  for (TinyModel model : {test::tiny_llama(), test::tiny_opt()}) {
    model.config["tie_word_embeddings"] = false;
    const PackedReader packed = pack(model);
    const Decoder expected = dense(model);
    const Decoder decoder = Decoder::from_packed(packed, find_backend("reference"));
    const at::Tensor ids = at::arange(20).mul(13).remainder(test::kTinyVocabSize).view({2, 10});

    const at::Tensor expected_rows = at::embedding(embedding(decoder.spec().embedding().shape), ids);
    if (decoder.spec().architecture->position == Position::kRotary) {  // nothing is added to the rows
      EXPECT_TRUE(at::equal(decoder.embed(ids), expected_rows));
    }
    at::Tensor hidden = decoder.embed(ids);
    const Positions positions = expected.positions(0, 10);
    for (int64_t index = 0; index < expected.spec().layers; ++index)
      hidden = expected.block(index)->forward(hidden, positions);
    const at::Tensor difference = decoder.logits(decoder.forward(ids)) - expected.logits(hidden);
    // Float32 sums of at most 176 products in another order, through two blocks; logits are of size one.
    EXPECT_LT(difference.abs().max().item<double>(), 1e-4);
  }
}

TEST_F(PackedDecoder, GivesNoDenseWeightOfAPackedLinear) {
  const Decoder decoder = Decoder::from_packed(pack(test::tiny_llama()), find_backend("reference"));
  EXPECT_EQ(decoder.block(1)->dense(Role::kO).weight().size(0), 64);  // this one is not packed
  EXPECT_THROW(decoder.block(0)->dense(Role::kO), std::logic_error);
}

/// The slowest backend of this machine that looks products of one token up; null where none does.
const Backend* backend_with_lookups() {
  for (const std::string_view name : available_backends())
    if (name.starts_with("cpu-") && name != "cpu-generic") return &find_backend(name);
  return nullptr;
}

TEST_F(PackedDecoder, ASingleTokenGetsTheSameBitsInOneRegion) {
  if (backend_with_lookups() == nullptr) GTEST_SKIP() << "no backend looks up";
  for (const TinyModel& model :
       {test::tiny_llama(), test::tiny_mistral(), test::tiny_qwen2(), test::tiny_qwen3(), test::tiny_opt()}) {
    const Decoder decoder = Decoder::from_packed(pack_codes(model), *backend_with_lookups(), at::kBFloat16);
    ASSERT_TRUE(decoder.has_decode_step());
    const c10::InferenceMode inference;
    const at::Tensor ids = at::arange(100).mul(13).remainder(test::kTinyVocabSize).unsqueeze(0);
    for (const int threads : {1, 2, 5}) {
      const test::Threads several(threads);
      // Two equal sequences take the readable path. So few tokens are looked up in either.
      constexpr int64_t kPrompt = 3;
      KeyValueCache cache = decoder.make_cache(1, 100), twin_cache = decoder.make_cache(2, 100);
      for (int64_t first = 0; first < 100; first += first == 0 ? kPrompt : 1) {
        const at::Tensor next = ids.slice(1, first, first == 0 ? kPrompt : first + 1);
        const at::Tensor hidden = decoder.forward(next, &cache),
                         expected = decoder.forward(next.repeat({2, 1}), &twin_cache).slice(0, 0, 1);
        ASSERT_TRUE(at::equal(hidden, expected))
            << model.config["model_type"] << ", " << threads << " threads, token " << first << ": "
            << (hidden - expected).abs().max().item<float>();
      }
    }
  }
}

TEST_F(PackedDecoder, OtherModelsTakeTheReadablePath) {
  const Backend& backend = find_backend("auto");
  EXPECT_FALSE(Decoder::from_packed(pack(test::tiny_llama()), backend, at::kBFloat16).has_decode_step());
  const auto takes_one_region = [&](const TinyModel& model) {
    return Decoder::from_packed(pack_codes(model), backend, at::kBFloat16).has_decode_step();
  };
  EXPECT_FALSE(takes_one_region(test::tiny_opt_350m())) << "norms behind the branches";
  TinyModel gelu = test::tiny_opt();
  gelu.config["activation_function"] = "gelu";
  EXPECT_FALSE(takes_one_region(gelu));
  EXPECT_FALSE(Decoder::from_packed(pack_codes(test::tiny_llama()), backend).has_decode_step());
}

TEST_F(PackedDecoder, AFullCacheIsRefused) {
  const Decoder decoder =
      Decoder::from_packed(pack_codes(test::tiny_llama()), find_backend("auto"), at::kBFloat16);
  const c10::InferenceMode inference;
  KeyValueCache cache = decoder.make_cache(1, 2);
  const at::Tensor id = at::ones({1, 1}, at::kLong);
  decoder.forward(id, &cache), decoder.forward(id, &cache);
  EXPECT_THROW(decoder.forward(id, &cache), Error);
}

/// The threads of this process by id. One that ends and is started again has another id.
std::set<std::string> threads_of_process() {
  std::set<std::string> ids;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task"))
    ids.insert(entry.path().filename());
  return ids;
}

TEST_F(PackedDecoder, KeepsTheThreadsItWasGiven) {
  TinyModel model = test::tiny_llama();  // wide enough that products, norms and attention are divided
  model.config.update({{"hidden_size", 512}, {"intermediate_size", 1024}});
  const c10::InferenceMode inference;
  const at::Tensor prompt = at::arange(60).mul(13).remainder(test::kTinyVocabSize).unsqueeze(0);
  const std::array decoders = {Decoder::from_packed(pack(model), find_backend("auto"), at::kBFloat16),
                               Decoder::from_packed(pack_codes(model), find_backend("auto"), at::kBFloat16)};
  for (const int count : {2, 3, 4, 5, 8, 9}) {  // ever more: what was started before is kept
    const Decoder& decoder = decoders[count % 2];
    const test::Threads threads(count);
    KeyValueCache cache = decoder.make_cache(1, 120);
    decoder.logits(decoder.forward(prompt, &cache));
    const std::set<std::string> before = threads_of_process();
    for (int token = 0; token < 50; ++token)
      decoder.logits(decoder.forward(prompt.slice(1, token, token + 1), &cache));
    for (int window = 0; window < 4; ++window) decoder.logits(decoder.forward(prompt));
    EXPECT_EQ(threads_of_process(), before) << "of " << count << " threads";
    EXPECT_LE(std::ssize(before), count);
  }
}

bool has_cuda_backend() {
  const auto names = available_backends();
  return std::ranges::find(names, "cuda") != names.end();
}

TEST_F(PackedDecoder, RunsWholeOnACudaDevice) {
  if (!has_cuda_backend()) GTEST_SKIP() << "no CUDA device";
  if (!torch_cuda_fault().empty()) GTEST_SKIP() << torch_cuda_fault();
  for (const TinyModel& model : {test::tiny_llama(), test::tiny_opt()}) {
    const PackedReader packed = pack(model);
    const Decoder on_device = Decoder::from_packed(packed, find_backend("cuda")),
                  on_cpu = Decoder::from_packed(packed, find_backend("reference"));
    const at::Tensor ids = at::arange(20).mul(13).remainder(test::kTinyVocabSize).view({2, 10});
    KeyValueCache cache = on_device.make_cache(2, 10);
    const at::Tensor head = on_device.forward(ids.slice(1, 0, 7), &cache),
                     tail = on_device.forward(ids.slice(1, 7, 10), &cache);
    const at::Tensor logits = on_device.logits(at::cat({head, tail}, 1)),
                     expected = on_cpu.logits(on_cpu.forward(ids));
    EXPECT_TRUE(logits.is_cuda());
    // Products on the device round activations to fp16, 2^-11 of their size, in each of 14 linears one after
    // the other.
    EXPECT_LT((logits.cpu() - expected).norm().item<double>(), 0.01 * expected.norm().item<double>());
  }
}

TEST(TorchCuda, SaysWhyThereIsNone) {
  if (torch_cuda_fault().empty()) GTEST_SKIP() << "libtorch has a CUDA device";
  EXPECT_EQ(at::ones({2}).sum().item<float>(), 2);  // the CPU half goes on
}

TEST_F(PackedDecoder, NamesWhatIsMissingOrMisshapen) {
  const TinyModel model = test::tiny_llama();
  expect_mismatch(pack(model, "model.norm.weight"), {"model.norm.weight", "missing"});
  expect_mismatch(pack(model, "model.embed_tokens.weight"), {"model.embed_tokens.weight", "missing"});
  expect_mismatch(pack(model, "model.layers.1.mlp.up_proj"),
                  {"model.layers.1.mlp.up_proj.weight", "missing"});
  expect_mismatch(pack(model, "", 8), {"model.layers.0.self_attn.q_proj", "72 x 64", "64 x 64"});
}

}  // namespace
}  // namespace stbllm
