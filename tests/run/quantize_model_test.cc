// The whole job on tiny models: what is in the file, that it means what the quantizer computed, and that
// neither threads nor interruptions change a byte of it.

#include "stbllm/run/quantize_model.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <set>

#include "stbllm/backend/backend.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/model/load_model.h"
#include "stbllm/model/torch_cuda.h"
#include "stbllm/pack/ledger.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/run/memory.h"
#include "stbllm/run/work_directory.h"
#include "support/calibration_text.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/processor.h"
#include "support/recipes.h"
#include "support/scratch_directory.h"
#include "support/threads.h"
#include "support/tiny_checkpoint.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::list;
using test::read_all;

constexpr int64_t kSamples = 8;  // one of them held out
constexpr int64_t kSeqlen = 48;  // more than Mistral's window of 16

/// In a scope no file of this process grows beyond so many bytes.
class FullDisk {
 public:
  explicit FullDisk(rlim_t largest_file) {
    ::getrlimit(RLIMIT_FSIZE, &before_);
    handler_ = ::signal(SIGXFSZ, SIG_IGN);  // write() then fails with EFBIG
    const rlimit limit = {largest_file, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FullDisk() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }
  FullDisk(const FullDisk&) = delete;
  FullDisk& operator=(const FullDisk&) = delete;

 private:
  rlimit before_{};
  sighandler_t handler_;
};

/// A checkpoint, a text and a directory for results.
class Workplace {
 public:
  explicit Workplace(const test::TinyModel& model) {
    test::write_checkpoint(scratch_ / "checkpoint", model);
    text_ = test::write_calibration_text(scratch_.path());
    fs::create_directory(results());
  }

  void replace_checkpoint(const test::TinyModel& model) const {
    test::write_checkpoint(scratch_ / "checkpoint", model);
  }

  QuantizeResult quantize(const Recipe& recipe, QuantizeOptions options, uint64_t seed = 0) const {
    const Checkpoint checkpoint = Checkpoint::open(scratch_ / "checkpoint");
    return quantize_model(checkpoint, make_calibration(checkpoint, text_, kSamples, 0, kSeqlen, seed), recipe,
                          options);
  }
  /// Quantizes to results()/name and returns that path.
  fs::path quantize(const Recipe& recipe, const std::string& name, bool dense = false) const {
    QuantizeOptions options;
    options.output = results() / name;
    options.dense_output = dense;
    quantize(recipe, options);
    return options.output;
  }
  /// The plan that quantize() would follow.
  nlohmann::json plan(const Recipe& recipe) const {
    const Checkpoint checkpoint = Checkpoint::open(scratch_ / "checkpoint");
    QuantizeOptions options;
    options.plan_only = true;
    return to_json(plan_quantization(checkpoint, make_calibration(checkpoint, text_, kSamples, 0, kSeqlen, 0),
                                     recipe, options),
                   ModelSpec::from_checkpoint(checkpoint));
  }
  /// A run that stops after its first `blocks` blocks, as one that was killed does.
  void leave_unfinished(const Recipe& recipe, const fs::path& output, int64_t blocks) const {
    // The disk is full when the result is written, and all blocks are in the work directory.
    QuantizeOptions options;
    options.output = output;
    {
      // The embedding alone has 272 x 64 floats = 68 KiB, a block's planes have less than 32.
      const FullDisk disk(48 << 10);
      expect_error(ErrorCode::kWriteFailed, output.filename(), [&] { quantize(recipe, options); });
    }
    const fs::path work = output.string() + ".work";
    for (const std::string& name : list(work))
      if (name.starts_with("block_") && std::stoll(name.substr(6)) >= blocks) fs::remove(work / name);
    ASSERT_TRUE(blocks == 0 || fs::exists(work / fmt::format("block_{:03}.safetensors", blocks - 1)));
  }
  /// What continues such a run, which is made here.
  QuantizeOptions to_resume(const Recipe& recipe, int64_t blocks,
                            const std::string& output = "packed") const {
    QuantizeOptions options;
    options.output = results() / output;
    leave_unfinished(recipe, options.output, blocks);
    options.resume = true;
    return options;
  }

  double perplexity(const fs::path& model) const {
    const LoadedModel loaded = load_model(model.string(), "cpu", "float32");
    const auto ids = loaded.tokenizer->encode(test::calibration_text(400, /*seed=*/2));
    return evaluate_perplexity(loaded.decoder, evaluation_windows(ids)).perplexity;
  }
  /// Logits (windows, seqlen, vocab) on the evaluation text.
  at::Tensor logits(const fs::path& model) const {
    const LoadedModel loaded = load_model(model.string(), "cpu", "float32");
    const auto ids = loaded.tokenizer->encode(test::calibration_text(400, /*seed=*/2));
    return loaded.decoder.logits(final_hidden_states(loaded.decoder, evaluation_windows(ids)));
  }

  fs::path checkpoint() const { return scratch_ / "checkpoint"; }
  const std::string& text() const { return text_; }
  fs::path results() const { return scratch_ / "results"; }

 private:
  static Windows evaluation_windows(const std::vector<int32_t>& ids) {
    Windows windows;
    for (size_t first = 0; first + kSeqlen <= ids.size(); first += kSeqlen)
      windows.emplace_back(ids.begin() + first, ids.begin() + first + kSeqlen);
    return windows;
  }

  test::ScratchDirectory scratch_;
  std::string text_;
};

test::TinyModel tiny_model(const std::string& family) {
  if (family == "llama") return test::tiny_llama();
  if (family == "mistral") return test::tiny_mistral();
  if (family == "qwen3") return test::tiny_qwen3();
  if (family == "opt_350m") return test::tiny_opt_350m();
  return test::tiny_opt();
}

/// Every group of every row has exactly N symbols, counted in the decoded codes (a kept weight may still be
/// zero where its inputs are dead and its scale is). Columns stored exactly are left out, and so is a last
/// group that is cut off.
void expect_exactly_n_kept(const std::string& name, const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  const at::Tensor nonzero = unpack_weight(matrix).symbols.ne(0);
  const auto outliers = matrix.outlier_columns();
  for (int64_t first = 0; first + layout.nm.group <= layout.cols; first += layout.nm.group) {
    const bool exact =
        std::ranges::any_of(outliers, [&](int32_t c) { return c >= first && c < first + layout.nm.group; });
    if (exact) continue;
    const at::Tensor kept = nonzero.narrow(1, first, layout.nm.group).sum(1);
    EXPECT_TRUE(kept.eq(layout.nm.keep).all().item<bool>()) << name << ", group at column " << first;
  }
}

using test::Products;

class QuantizeModel : public ::testing::TestWithParam<std::tuple<std::string, std::string, Products>> {
 private:
  const test::Assume products_{std::get<Products>(GetParam())};
};

TEST_P(QuantizeModel, PackedFileIsTheQuantizersModel) {
  const auto& [family, preset, products] = GetParam();
  const Workplace place(tiny_model(family));
  const Recipe recipe = Recipe::load(preset);
  QuantizeOptions options;
  options.output = place.results() / "packed.safetensors";
  const QuantizeResult result = place.quantize(recipe, options);
  EXPECT_EQ(list(place.results()), std::vector<std::string>{"packed.safetensors"});

  // Strict N:M in the file, for every linear of the model, each with the N that the result tells.
  const PackedReader reader = PackedReader::open(options.output);
  reader.verify_checksums();
  EXPECT_EQ(reader.linears().size(), result.linears.size());
  EXPECT_EQ(result.linears.size(), 2u * (family.starts_with("opt") ? 6 : 7));
  for (const LinearResult& linear : result.linears) {
    const StructuredBinaryMatrix& matrix = reader.linears().at(linear.name);
    EXPECT_EQ((Scheme{.nm = matrix.layout().nm, .levels = matrix.layout().levels}), linear.scheme)
        << linear.name;
    if (const auto* pattern = std::get_if<PatternAllocation>(&recipe.model.allocation)) {
      EXPECT_TRUE(linear.scheme == pattern->scheme || pattern->vary != PatternAllocation::Vary::kNot)
          << linear.name;
    }
    expect_exactly_n_kept(linear.name, matrix);
  }

  // The nominal bits are those of the ledger, which reads them from the planes.
  EXPECT_NEAR(make_ledger(reader).nominal_bits, result.nominal_bits, 1e-12);

  // Packed and dense differ by the order of float32 sums alone.
  const fs::path dense = place.quantize(recipe, "dense", /*dense=*/true);
  const double expected = place.perplexity(dense);
  EXPECT_NEAR(place.perplexity(options.output), expected, 1e-4 * expected);
  EXPECT_LT(result.verified_logits, 1e-4);
  // And they are not the original, which would agree with itself.
  const at::Tensor original = place.logits(place.checkpoint()), quantized = place.logits(dense);
  EXPECT_GT((original - quantized).norm().item<double>(), 0.01 * original.norm().item<double>());
}

std::string name_of(const std::string& what, Products products) {
  std::string name = what + "_" + test::name_of(products);
  std::ranges::replace(name, '-', '_');
  return name;
}

const auto kFamilies = ::testing::Values("llama", "mistral", "qwen3", "opt", "opt_350m");
const auto kFamilyPresetAndProducts = [](const auto& info) {
  return name_of(std::get<0>(info.param) + "_" + std::get<1>(info.param), std::get<2>(info.param));
};
INSTANTIATE_TEST_SUITE_P(EveryPreset, QuantizeModel,
                         ::testing::Combine(kFamilies,
                                            ::testing::Values("rtn", "billm", "stbllm-paper", "stbllm",
                                                              "stbllm-2bit", "stbllm-1bit"),
                                            ::testing::Values(Products::kFloat32)),
                         kFamilyPresetAndProducts);
// Products decide what the inputs of a linear are; a preset of each kind shows that nothing else hangs on
// them.
INSTANTIATE_TEST_SUITE_P(EitherKind, QuantizeModel,
                         ::testing::Combine(kFamilies, ::testing::Values("stbllm-paper", "stbllm"),
                                            ::testing::Values(Products::kBFloat16)),
                         kFamilyPresetAndProducts);

TEST(QuantizeModelBudget, StaysWithinTheStoredBitsAskedFor) {
  for (const std::string family : {"llama", "opt"}) {
    const Workplace place(tiny_model(family));
    for (const double bits : {1.7, 2.1}) {
      SCOPED_TRACE(family + " " + std::to_string(bits));
      const Recipe recipe = test::with_budget("stbllm", bits);
      QuantizeOptions options;
      options.output = place.results() / "budget.safetensors";
      options.force = true;
      const QuantizeResult result = place.quantize(recipe, options);
      EXPECT_LT(result.verified_logits, 1e-4);
      const Ledger ledger = make_ledger(PackedReader::open(options.output));
      EXPECT_LE(ledger.stored_bits, bits);
      EXPECT_GT(ledger.stored_bits, 0.9 * bits);  // the next code of a linear of this size is that far
      std::set<std::string> codes;
      for (const LinearEntry& entry : ledger.linears) codes.insert(entry.layout.nm.str());
      EXPECT_GT(codes.size(), 1u);
    }
  }
}

TEST(QuantizeModelBudget, RefusesWhatTheSmallestCodesExceed) {
  const Workplace place(test::tiny_llama());
  EXPECT_THROW(place.quantize(test::with_budget("stbllm", 0.3), "small"), Error);
}

TEST(QuantizeModelBudget, ItsPlanOutlivesAnInterruption) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = test::with_budget("stbllm", 1.7);
  const std::string undisturbed = read_all(place.quantize(recipe, "undisturbed"));
  const QuantizeOptions options = place.to_resume(recipe, 0);
  const fs::path plan = options.output.string() + ".work/plan.json";
  const std::string planned = read_all(plan);
  test::write_text(plan, "{");
  expect_error(ErrorCode::kCorrupt, "plan.json",
               [&] { place.quantize(recipe, options); });  // it is read, not made again
  test::write_text(plan, planned);
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output) == undisturbed);
}

TEST(QuantizeModelBudget, ADamagedPlanCostsNoFinishedBlock) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = test::with_budget("stbllm", 1.7);
  const std::string undisturbed = read_all(place.quantize(recipe, "undisturbed"));
  const QuantizeOptions options = place.to_resume(recipe, 1);
  const fs::path work = options.output.string() + ".work";
  const std::string block = read_all(work / "block_000.safetensors");
  test::write_text(work / "plan.json", "");
  expect_error(ErrorCode::kCorrupt, "plan.json: damaged; remove this file, and --resume",
               [&] { place.quantize(recipe, options); });
  EXPECT_TRUE(read_all(work / "block_000.safetensors") == block);
  fs::remove(work / "plan.json");  // as the message says
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output) == undisturbed);
}

/// `recipe` with the down projections left alone, and 3:8 in the output projections.
Recipe with_rules(Recipe recipe) {
  recipe.model.rules = {{.linears = "*.down_proj", .code = {}},
                        {.linears = "*.o_proj", .code = Scheme{.nm = {3, 8}, .levels = 1}}};
  return recipe;
}

TEST(Rules, GoBeforePatternsAndBudgets) {
  const Workplace place(test::tiny_llama());
  for (const Recipe& recipe :
       {Recipe::load("stbllm"), test::with_budget("stbllm", 1.7), Recipe::load("rtn")}) {
    QuantizeOptions options;
    options.output = place.results() / "packed";
    options.force = true;
    const QuantizeResult result = place.quantize(with_rules(recipe), options);
    EXPECT_LT(result.verified_logits, 1e-4);
    EXPECT_EQ(result.linears.size(), 2 * 6u);
    const PackedReader reader = PackedReader::open(options.output);
    const std::string block = "model.layers.1.";
    EXPECT_FALSE(reader.linears().contains(block + "mlp.down_proj"));
    EXPECT_TRUE(reader.has_dense(block + "mlp.down_proj.weight"));
    EXPECT_EQ(reader.linears().at(block + "self_attn.o_proj").layout().nm, (NmPattern{3, 8}));
    EXPECT_NE(reader.linears().at(block + "mlp.up_proj").layout().nm, (NmPattern{3, 8}));
    if (std::holds_alternative<BudgetAllocation>(recipe.model.allocation)) {
      EXPECT_LE(make_ledger(reader).stored_bits, 1.7);
    }
  }
}

TEST(Rules, HoldAfterAnInterruptionAndInTraining) {
  const Workplace place(test::tiny_llama());
  Recipe recipe = with_rules(Recipe::load("stbllm"));
  recipe.training.tune = TrainingPolicy::kDefaultTune;
  recipe.training.distill = TrainingPolicy::kDefaultDistill;
  const fs::path undisturbed = place.quantize(recipe, "undisturbed");
  EXPECT_TRUE(PackedReader::open(undisturbed).has_dense("model.layers.0.mlp.down_proj.weight"));
  const QuantizeOptions options = place.to_resume(recipe, 1);
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output) == read_all(undisturbed));
}

TEST(Rules, AreRefusedWhereTheyNameNothingOrLeaveNothing) {
  const Workplace place(test::tiny_llama());
  Recipe recipe = Recipe::load("stbllm");
  recipe.model.rules = {{.linears = "*.fc1", .code = {}}};
  expect_error(ErrorCode::kUsage, "no linear is called '*.fc1'", [&] { place.quantize(recipe, "packed"); });
  recipe.model.rules = {{.linears = "*", .code = {}}};
  expect_error(ErrorCode::kUsage, "nothing is left to quantize", [&] { place.quantize(recipe, "packed"); });
  EXPECT_TRUE(list(place.results()).empty());
}

TEST(GivenPlan, IsFollowedToTheSameBytes) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = with_rules(test::with_budget("stbllm", 1.7));
  const std::string direct = read_all(place.quantize(recipe, "direct"));
  const nlohmann::json plan = place.plan(recipe);
  EXPECT_TRUE(list(place.results()) == std::vector<std::string>{"direct"});
  QuantizeOptions options;
  options.output = place.results() / "planned";
  options.plan = plan;
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output) == direct);

  options.output = place.results() / "edited";
  options.plan["model.layers.0.mlp.up_proj"]["code"] = "1:4x2";
  place.quantize(recipe, options);
  EXPECT_EQ(PackedReader::open(options.output).linears().at("model.layers.0.mlp.up_proj").layout().nm,
            (NmPattern{1, 4}));
}

TEST(GivenPlan, IsRefusedWhereItDoesNotFitTheModel) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("stbllm");
  const nlohmann::json plan = place.plan(recipe);
  const auto refused = [&](const std::string& linear, const nlohmann::json& entry, const std::string& part) {
    QuantizeOptions options;
    options.output = place.results() / "packed";
    options.plan = plan;
    if (entry.is_null())
      options.plan.erase(linear);
    else
      options.plan[linear] = entry;
    expect_error(ErrorCode::kUsage, part, [&] { place.quantize(recipe, options); });
  };
  const std::string up = "model.layers.0.mlp.up_proj";
  refused(up, nullptr, "says nothing about " + up);
  refused(up, "3:8", R"(expected {"code": "3:8"})");
  refused(up, {{"code", "3:9"}}, "N:M pattern '3:9'");
  refused(up, {{"code", "3:8"}, {"outlier_limit", -1}}, "outlier_limit is -1");
  refused("model.layers.7.mlp.up_proj", {{"code", "3:8"}}, "which the model does not have");
  EXPECT_TRUE(list(place.results()).empty());
}

TEST(QuantizeModelNm, AcceptsEveryGroupWidth) {
  const Workplace place(test::tiny_llama());
  for (const NmPattern nm : {NmPattern{1, 4}, {3, 4}, {2, 8}, {6, 8}, {5, 16}, {16, 16}}) {
    const Recipe recipe = test::with_scheme("rtn", {.nm = nm, .levels = 1});
    const fs::path packed =
        place.quantize(recipe, "packed-" + std::to_string(nm.keep) + "-" + std::to_string(nm.group));
    const PackedReader reader = PackedReader::open(packed);
    for (const auto& [name, matrix] : reader.linears()) {
      EXPECT_EQ(matrix.layout().nm, nm);
      expect_exactly_n_kept(name, matrix);
    }
  }
}

// --- determinism and interruptions -------------------------------------------------------------------

class SameBytes : public ::testing::TestWithParam<std::tuple<std::string, Products>> {
 protected:
  const Recipe recipe_ = Recipe::load(std::get<std::string>(GetParam()));

 private:
  const test::Assume products_{std::get<Products>(GetParam())};
};

TEST_P(SameBytes, WhateverTheNumberOfThreads) {
  const Workplace place(test::tiny_llama());
  fs::path one, two;
  {
    const test::Threads threads(1);
    one = place.quantize(recipe_, "one");
  }
  {
    const test::Threads threads(2);
    two = place.quantize(recipe_, "two");
  }
  EXPECT_TRUE(read_all(one) == read_all(two));
}

TEST_P(SameBytes, AfterAnInterruption) {
  const Workplace place(test::tiny_llama());
  const std::string undisturbed = read_all(place.quantize(recipe_, "undisturbed"));
  for (const int64_t finished : {0, 1, 2}) {
    const QuantizeOptions options = place.to_resume(recipe_, finished, fmt::format("resumed-{}", finished));
    place.quantize(recipe_, options);
    EXPECT_TRUE(read_all(options.output) == undisturbed) << finished << " blocks were finished";
    EXPECT_FALSE(fs::exists(options.output.string() + ".work"));
  }
}

INSTANTIATE_TEST_SUITE_P(Presets, SameBytes,
                         ::testing::Combine(::testing::Values("rtn", "stbllm-paper", "stbllm"),
                                            ::testing::Values(Products::kFloat32, Products::kBFloat16)),
                         [](const auto& info) {
                           return name_of(std::get<0>(info.param), std::get<1>(info.param));
                         });

TEST(Interruption, StopsARunAndSaysHowToGoOn) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("rtn");
  const std::string undisturbed = read_all(place.quantize(recipe, "undisturbed"));
  const QuantizeOptions options = place.to_resume(recipe, 1);
  request_interrupt();
  expect_error(ErrorCode::kInterrupted, "--resume", [&] { place.quantize(recipe, options); });
  EXPECT_FALSE(fs::exists(options.output));
  // The request stopped one run, not those that follow.
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output) == undisturbed);
}

TEST(Interruption, BeforeTheFirstBlockLeavesNothing) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "packed";
  request_interrupt();
  expect_error(ErrorCode::kInterrupted, "no block was finished",
               [&] { place.quantize(Recipe::load("rtn"), options); });
  EXPECT_EQ(list(place.results()), std::vector<std::string>{});
}

TEST(Resume, IsRefusedWithOtherInputs) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("rtn");
  const QuantizeOptions options = place.to_resume(recipe, 1);

  Recipe other = recipe;
  test::scheme_of(other).nm = {6, 8};
  expect_error(ErrorCode::kMismatch, "nm: \"4:8\" there, \"6:8\" here",
               [&] { place.quantize(other, options); });
  expect_error(ErrorCode::kMismatch, "seed: 0 there, 7 here",
               [&] { place.quantize(recipe, options, /*seed=*/7); });
  QuantizeOptions fewer = options;
  fewer.blocks = 1;
  expect_error(ErrorCode::kMismatch, "blocks: 2 there, 1 here", [&] { place.quantize(recipe, fewer); });

  test::TinyModel tuned = test::tiny_llama();
  tuned.seed = 1;
  place.replace_checkpoint(tuned);  // of the same shapes
  expect_error(ErrorCode::kMismatch, "weights: ", [&] { place.quantize(recipe, options); });
  place.replace_checkpoint(test::tiny_llama());

  const fs::path fingerprint = options.output.string() + ".work/fingerprint.json";
  const std::string own = read_all(fingerprint);
  nlohmann::json of_another_build = nlohmann::json::parse(own);
  of_another_build["program"] = "0";
  test::write_text(fingerprint, of_another_build.dump());
  expect_error(ErrorCode::kMismatch, "program: ", [&] { place.quantize(recipe, options); });
  test::write_text(fingerprint, own);

  place.quantize(recipe, options);  // the refusals did not harm it
  EXPECT_TRUE(fs::exists(options.output));
}

TEST(Resume, IsRefusedWithADamagedBlock) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("stbllm");
  const std::string undisturbed = read_all(place.quantize(recipe, "undisturbed"));
  const QuantizeOptions options = place.to_resume(recipe, 2);
  const fs::path block = options.output.string() + ".work/block_000.safetensors";
  std::string bytes = read_all(block);
  bytes[bytes.size() - 500] ^= 4;
  test::write_text(block, bytes);
  expect_error(ErrorCode::kCorrupt, "remove this file", [&] { place.quantize(recipe, options); });
  fs::remove(block);
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output) == undisturbed);
}

TEST(Resume, IsRefusedWhereNothingWasBegun) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "packed";
  options.resume = true;
  expect_error(ErrorCode::kNotFound, "no unfinished run",
               [&] { place.quantize(Recipe::load("rtn"), options); });
  EXPECT_EQ(list(place.results()), std::vector<std::string>{});
}

TEST(Overwriting, TheCheckpointItselfIsRefusedEvenWithForce) {
  const Workplace place(test::tiny_llama());
  const std::string weights = read_all(place.checkpoint() / "model.safetensors");
  QuantizeOptions options;
  options.force = true;
  options.output = place.checkpoint() / "model.safetensors";
  expect_error(ErrorCode::kUsage, "the checkpoint itself",
               [&] { place.quantize(Recipe::load("rtn"), options); });
  options.output = place.checkpoint();
  options.dense_output = true;
  expect_error(ErrorCode::kUsage, "the checkpoint itself",
               [&] { place.quantize(Recipe::load("rtn"), options); });
  EXPECT_TRUE(read_all(place.checkpoint() / "model.safetensors") == weights);
}

TEST(Overwriting, WhatIsNoWorkDirectoryStaysEvenWithForce) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "packed";
  options.force = true;
  fs::create_directory(place.results() / "packed.work");
  std::ofstream(place.results() / "packed.work" / "mine") << "mine";
  expect_error(ErrorCode::kExists, "no work directory",
               [&] { place.quantize(Recipe::load("rtn"), options); });
  EXPECT_EQ(read_all(place.results() / "packed.work" / "mine"), "mine");
}

TEST(Overwriting, AnUnfinishedRunNeedsForce) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("rtn");
  QuantizeOptions options;
  options.output = place.results() / "packed";
  place.leave_unfinished(recipe, options.output, 1);
  expect_error(ErrorCode::kExists, "--resume", [&] { place.quantize(recipe, options); });
  EXPECT_TRUE(fs::exists(options.output.string() + ".work/block_000.safetensors"));
  options.force = true;
  place.quantize(recipe, options);
  EXPECT_EQ(list(place.results()), std::vector<std::string>{"packed"});
}

TEST(Overwriting, ARunThatIsAtWorkIsLeftAlone) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "packed";
  const WorkDirectory other(options.output, {{"some", "run"}}, /*resume=*/false, /*force=*/false);
  for (const bool resume : {false, true}) {
    options.resume = resume;
    options.force = !resume;
    expect_error(ErrorCode::kExists, "another run is at work there",
                 [&] { place.quantize(Recipe::load("rtn"), options); });
    EXPECT_EQ(list(other.path()), std::vector<std::string>{"fingerprint.json"});
  }
}

TEST(Overwriting, AResultNeedsForce) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("rtn");
  QuantizeOptions options;
  options.output = place.results() / "packed";
  test::write_text(options.output, "mine");
  expect_error(ErrorCode::kExists, "--force", [&] { place.quantize(recipe, options); });
  EXPECT_EQ(read_all(options.output), "mine");
  options.force = true;
  place.quantize(recipe, options);
  EXPECT_EQ(PackedReader::open(options.output).linears().size(), 14u);
}

TEST(Overwriting, AnOutputOfTheOtherKindIsRefusedAtOnce) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("rtn");
  QuantizeOptions options;
  options.output = place.results() / "directory";
  fs::create_directory(options.output);
  test::write_text(options.output / "file", "mine");
  for (const bool force : {false, true}) {
    options.force = force;
    expect_error(ErrorCode::kUsage, "a directory is there", [&] { place.quantize(recipe, options); });
    EXPECT_EQ(list(place.results()), std::vector<std::string>{"directory"});  // no work directory either
  }
  options.output /= "file";
  options.dense_output = true;
  expect_error(ErrorCode::kUsage, "a file is there", [&] { place.quantize(recipe, options); });
  EXPECT_EQ(read_all(options.output), "mine");
}

// --- dense output, and what is refused ------------------------------------------------------------------

TEST(DenseOutput, HoldsRecipesWithoutPackedForm) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("stbllm-released");
  QuantizeOptions options;
  options.output = place.results() / "packed";
  expect_error(ErrorCode::kUnsupported, "--dense", [&] { place.quantize(recipe, options); });
  EXPECT_EQ(list(place.results()), std::vector<std::string>{});

  const fs::path dense = place.quantize(recipe, "dense", /*dense=*/true);
  EXPECT_EQ(list(dense), (std::vector<std::string>{"config.json", "model.safetensors", "tokenizer.json",
                                                   "tokenizer_config.json"}));
  EXPECT_GT(place.perplexity(dense), 1);
}

TEST(DenseOutput, LeavesNothingOfAnotherModelBeside) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "dense";
  options.dense_output = options.force = true;
  fs::create_directory(options.output);
  for (const char* name : {"tokenizer.model", "merges.txt", "pytorch_model.bin", "notes.txt"})
    test::write_text(options.output / name, "old");
  place.quantize(Recipe::load("stbllm-released"), options);
  EXPECT_EQ(list(options.output), (std::vector<std::string>{"config.json", "model.safetensors", "notes.txt",
                                                            "tokenizer.json", "tokenizer_config.json"}));
}

TEST(DenseOutput, ReplacesAnEarlierOneAsAWholeOrNotAtAll) {
  const Workplace place(test::tiny_llama());
  const fs::path output = place.quantize(Recipe::load("rtn"), "dense", /*dense=*/true);
  const std::string weights = read_all(output / "model.safetensors");
  // One of the files cannot be written. The others must not be of the new model then.
  fs::remove(output / "tokenizer.json");
  fs::create_directory(output / "tokenizer.json");
  QuantizeOptions options;
  options.output = output;
  options.dense_output = options.force = true;
  expect_error(ErrorCode::kWriteFailed, "tokenizer.json",
               [&] { place.quantize(Recipe::load("stbllm-released"), options); });
  EXPECT_TRUE(read_all(output / "model.safetensors") == weights);
  EXPECT_EQ(list(place.results()), (std::vector<std::string>{"dense", "dense.work"}));
  fs::remove(output / "tokenizer.json");
  options.resume = true;
  place.quantize(Recipe::load("stbllm-released"), options);
  EXPECT_FALSE(read_all(output / "model.safetensors") == weights);
  EXPECT_EQ(list(place.results()), (std::vector<std::string>{"dense"}));
}

TEST(DenseOutput, IsResumedWithTheSameBytes) {
  const Workplace place(test::tiny_llama());
  const Recipe recipe = Recipe::load("stbllm-released");
  const std::string undisturbed =
      read_all(place.quantize(recipe, "undisturbed", /*dense=*/true) / "model.safetensors");
  QuantizeOptions options;
  options.output = place.results() / "dense";
  options.dense_output = true;
  // As above, but what is in the way is the file inside the directory.
  fs::create_directories(options.output / "model.safetensors");
  options.force = true;
  expect_error(ErrorCode::kWriteFailed, "Is a directory", [&] { place.quantize(recipe, options); });
  fs::remove_all(options.output);
  fs::remove(options.output.string() + ".work/block_001.safetensors");
  options.force = false;
  options.resume = true;
  place.quantize(recipe, options);
  EXPECT_TRUE(read_all(options.output / "model.safetensors") == undisturbed);
}

TEST(Blocks, BeyondTheFirstStayDense) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "packed";
  options.blocks = 1;
  const QuantizeResult result = place.quantize(Recipe::load("rtn"), options);
  EXPECT_EQ(result.linears.size(), 7u);
  const PackedReader reader = PackedReader::open(options.output);
  EXPECT_TRUE(reader.linears().contains("model.layers.0.mlp.down_proj"));
  EXPECT_TRUE(reader.has_dense("model.layers.1.mlp.down_proj.weight"));
  EXPECT_LT(result.verified_logits, 1e-4);
}

TEST(Device, CudaQuantizesAsTheCpuDoesOrSaysWhyNot) {
  const Workplace place(test::tiny_llama());
  QuantizeOptions options;
  options.output = place.results() / "device";
  options.device = "cuda";
  if (!torch_cuda_fault().empty()) {
    expect_error(ErrorCode::kUnsupported, "device 'cuda'",
                 [&] { place.quantize(Recipe::load("stbllm"), options); });
    EXPECT_EQ(list(place.results()), std::vector<std::string>{});
    return;
  }
  // With three levels 4:8 has more states than are tried, so that the search returns to the host.
  const Recipe local = test::with_scheme("stbllm", {.nm = {4, 8}, .levels = 3});
  Recipe alone = Recipe::load("stbllm");
  test::lean_of(alone).compensate = Compensate::kNone;
  options.force = true;
  for (const Recipe& recipe : {Recipe::load("stbllm"), local, alone, Recipe::load("stbllm-paper")}) {
    place.quantize(recipe, options);
    const fs::path on_host = place.quantize(recipe, "cpu");
    // Products round to bfloat16 in another order, which decides close calls between codes another way.
    EXPECT_NEAR(place.perplexity(options.output) / place.perplexity(on_host), 1, 0.02);
    fs::remove(on_host);
  }
}

// --- memory
// ---------------------------------------------------------------------------------------------------

class MaxMemory : public ::testing::Test {
 protected:
  MaxMemory() { options.compare_blocks = true; }

  const Workplace place{test::tiny_opt()};
  const Recipe recipe = Recipe::load("rtn");
  const Checkpoint checkpoint = Checkpoint::open(place.checkpoint());
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  // Two streams of 512 windows x 48 tokens x 64 bfloat16 numbers, 3.1 MB each, are far more than what a
  // process gains while it does nothing.
  const Calibration calibration = make_calibration(checkpoint, place.text(), 512, 0, kSeqlen, 0);
  QuantizeOptions options;
};

TEST_F(MaxMemory, HiddenStatesInAFileGiveTheSameBytes) {
  options.output = place.results() / "in-memory";
  const QuantizeResult in_memory = quantize_model(checkpoint, calibration, recipe, options);
  options.output = place.results() / "spilled";
  options.max_memory = plan_memory(spec, calibration, recipe, options).peak_bytes - (4 << 20);
  ASSERT_TRUE(plan_memory(spec, calibration, recipe, options).spill);
  const QuantizeResult spilled = quantize_model(checkpoint, calibration, recipe, options);
  EXPECT_TRUE(read_all(place.results() / "in-memory") == read_all(place.results() / "spilled"));
  EXPECT_EQ(list(place.results()), (std::vector<std::string>{"in-memory", "spilled"}));
  ASSERT_EQ(spilled.blocks.size(), in_memory.blocks.size());
  for (size_t i = 0; i < spilled.blocks.size(); ++i)
    EXPECT_EQ(spilled.blocks[i].relative_error, in_memory.blocks[i].relative_error);
}

TEST_F(MaxMemory, TooLittleIsRefusedAtOnce) {
  options.output = place.results() / "packed";
  options.max_memory = 1 << 20;
  expect_error(ErrorCode::kUsage, "--max-memory 1048576", [&] { place.quantize(recipe, options); });
  EXPECT_EQ(list(place.results()), std::vector<std::string>{});
}

TEST_F(MaxMemory, IsWhatTheMachineHasWhereNoneIsNamed) {
  const int64_t needed = require_memory(spec, calibration, recipe, options).peak_bytes;
  EXPECT_LT(needed, machine_memory());
  constexpr int64_t kLess = 4 << 20;
  EXPECT_TRUE(require_memory(spec, calibration, recipe, options, needed - kLess).spill);
  expect_error(ErrorCode::kOutOfMemory, "this machine has 1048576",
               [&] { require_memory(spec, calibration, recipe, options, 1 << 20); });
  options.max_memory = 2 * needed;  // who names a limit knows why
  EXPECT_FALSE(require_memory(spec, calibration, recipe, options, 1 << 20).spill);
}

// --- embedding and head codings ---------------------------------------------------------------------------

TEST(RowCodings, ChangeLogitsOnlyALittle) {
  for (const auto& model : {test::tiny_llama(), test::tiny_opt()}) {
    const Workplace place(model);
    Recipe recipe = Recipe::load("rtn");
    const at::Tensor exact = place.logits(place.quantize(recipe, "keep"));
    // Rounding noise of a row coded on its own, relative to its size: fp16 2^-12; 8 bits on a block of 64
    // normal values 2.5 sigma / 127 / sqrt(12) = 0.6 %; 4 bits about 12 %. A random model amplifies it
    // severalfold, and head and embedding add up.
    const std::pair<RowCoding, double> bounds[] = {
        {RowCoding::kFloat16, 2e-3}, {RowCoding::kInt8, 0.04}, {RowCoding::kInt4, 0.6}};
    double smaller = 0;
    for (const auto& [coding, bound] : bounds) {
      recipe.model.embedding = recipe.model.head = coding;
      const at::Tensor coded =
          place.logits(place.quantize(recipe, "coding-" + std::to_string(static_cast<int>(coding))));
      const double distance = ((coded - exact).norm() / exact.norm()).item<double>();
      EXPECT_LT(distance, bound);
      EXPECT_GT(distance, smaller);  // fewer bits, more noise
      smaller = distance;
    }
  }
}

}  // namespace
}  // namespace stbllm
