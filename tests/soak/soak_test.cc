// Random models by random recipes: what is in the file is what was computed, whatever the shape, the code,
// the number of threads and processes, and however often the run was interrupted.
//
// The suite has a few cases, scripts/soak.sh runs hundreds: STBLLM_SOAK="FIRST COUNT" in the environment says
// which. A case depends on nothing but its number.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <sstream>
#include <thread>

#include "cli/process_pair.h"
#include "soak/random_case.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/reproducible.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/pack/ledger.h"
#include "stbllm/pack/packed_file.h"
#include "stbllm/quantize/compensate.h"
#include "stbllm/quantize/lean_weight.h"
#include "stbllm/quantize/quantize_linear.h"
#include "stbllm/run/quantize_model.h"
#include "stbllm/run/work_directory.h"
#include "support/calibration_text.h"
#include "support/files.h"
#include "support/naive_decoder.h"
#include "support/products.h"
#include "support/scratch_directory.h"
#include "support/threads.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test::Random;
using test::read_all;

// --- what is in a file --------------------------------------------------------------------------

/// The weights of a linear by the decoder that was written from FORMAT.md, float32 (rows, cols).
at::Tensor decode_naively(const SafetensorsFile& file, const std::string& name) {
  const json layout = json::parse(file.metadata().at("linears")).at(name);
  const auto nm = NmPattern::parse(layout.at("nm").get<std::string>());
  std::map<std::string, std::span<const std::byte>> planes;
  for (const auto& [tensor, entry] : file.tensors())
    if (tensor.starts_with(name + '.')) planes[tensor.substr(name.size() + 1)] = entry.data;
  const test::NaiveDecoder decoder({.rows = layout.at("rows"),
                                    .cols = layout.at("cols"),
                                    .keep = nm.keep,
                                    .group = nm.group,
                                    .levels = layout.at("levels"),
                                    .column_block = layout.at("column_block"),
                                    .scale_bits = layout.at("scale_bits"),
                                    .salient = layout.at("salient"),
                                    .outliers = layout.at("outliers")},
                                   planes);
  const at::Tensor weights = at::empty({layout.at("rows"), layout.at("cols")});
  auto out = weights.accessor<float, 2>();
  for (int64_t r = 0; r < weights.size(0); ++r)
    for (int64_t c = 0; c < weights.size(1); ++c) out[r][c] = decoder.weight(r, c);
  return weights;
}

/// Every group of every row has N symbols, or as many as it has columns. What a code says of an outlier
/// column does not count, but it is a symbol.
void expect_exactly_n_kept(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  const at::Tensor kept = unpack_weight(matrix).symbols.ne(0);
  for (int64_t first = 0; first < layout.cols; first += layout.nm.group) {
    const int64_t width = std::min<int64_t>(layout.nm.group, layout.cols - first);
    const bool exact = std::ranges::any_of(matrix.outlier_columns(),
                                           [&](int32_t c) { return c >= first && c < first + width; });
    if (exact) continue;
    EXPECT_TRUE(
        kept.narrow(1, first, width).sum(1).eq(std::min<int64_t>(layout.nm.keep, width)).all().item<bool>())
        << "group at column " << first;
  }
}

/// Every backend multiplies as the reference does, within the bound of tests/kernels.
void expect_backends_agree(const StructuredBinaryMatrix& matrix, Random& random) {
  const auto type = random.any_of({ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16});
  const int64_t tokens = random.any_of({1, 2, 9, 40});
  test::Buffer x = test::random_activations(type, tokens, matrix.layout().cols, test::Content::kReal,
                                            static_cast<uint64_t>(random.between(0, 1000)));
  const std::vector<test::Tolerance> tolerance = test::tolerances(matrix, x);
  test::Buffer expected = test::run("reference", matrix, x);
  for (const std::string_view backend : available_backends()) {
    if (backend == "reference" || backend == "cuda") continue;
    test::Buffer y = test::run(backend, matrix, x);
    for (int64_t i = 0; i < std::ssize(tolerance); ++i)
      ASSERT_NEAR(load_element(y.view(), i), load_element(expected.view(), i), tolerance[i].of(backend, x))
          << backend << ", " << test::describe(matrix.layout()) << ", " << tokens << " tokens of type "
          << static_cast<int>(type) << ", result " << i;
  }
}

/// The ledger says what the file's own header says, to the byte.
void expect_ledger_counts_every_byte(const fs::path& path) {
  const PackedReader reader = PackedReader::open(path);
  const Ledger ledger = make_ledger(reader);
  const std::string bytes = read_all(path);
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
  const json header = json::parse(bytes.substr(sizeof header_bytes, header_bytes));
  const json linears = json::parse(header["__metadata__"]["linears"].get<std::string>());
  int64_t in_linears = 0, in_others = 0;
  for (const auto& [name, tensor] : header.items()) {
    if (name == "__metadata__") continue;
    const std::array<int64_t, 2> ends = tensor["data_offsets"];
    (linears.contains(name.substr(0, name.rfind('.'))) && name.substr(name.rfind('.')) != ".bias"
         ? in_linears
         : in_others) += ends[1] - ends[0];
  }
  EXPECT_EQ(ledger.linear_bytes, in_linears);
  EXPECT_EQ(ledger.dense_bytes, in_others);
  EXPECT_EQ(ledger.file_bytes, std::ssize(bytes));
  EXPECT_EQ(static_cast<int64_t>(sizeof header_bytes + header_bytes) + in_linears + in_others,
            std::ssize(bytes));
  int64_t in_planes = 0;
  for (const auto& [plane, count] : ledger.plane_bytes) in_planes += count;
  EXPECT_EQ(in_planes, in_linears);
}

void expect_file_is_sound(const fs::path& path, Random& random) {
  const PackedReader reader = PackedReader::open(path);
  reader.verify_checksums();
  for (const auto& [name, matrix] : reader.linears()) {
    SCOPED_TRACE(name);
    expect_exactly_n_kept(matrix);
    expect_backends_agree(matrix, random);
  }
  expect_ledger_counts_every_byte(path);
}

// --- one linear ---------------------------------------------------------------------------------

/// A linear and what is known of its inputs: few tokens or many, some columns dead, one perhaps very loud.
struct RandomLinear {
  at::Tensor weight;
  InputStats stats;
};

RandomLinear random_linear(Random& random) {
  const int64_t rows = random.one_in(6) ? 1 : random.between(2, 90);
  const int64_t cols = random.one_in(6) ? random.between(1, 9) : random.between(10, 300);
  const int64_t tokens = random.one_in(3) ? random.between(1, 9) : random.between(10, 2 * cols + 64);
  at::manual_seed(static_cast<uint64_t>(random.between(0, 1 << 30)));
  at::Tensor inputs = at::randn({tokens, cols});
  if (random.one_in(2)) inputs = inputs.mm(at::randn({cols, cols})) / std::sqrt(static_cast<double>(cols));
  for (int64_t dead = random.one_in(3) ? random.between(1, cols) : 0; dead > 0; --dead)
    inputs.select(1, random.between(0, cols - 1)).zero_();
  if (random.one_in(3)) inputs.select(1, random.between(0, cols - 1)).mul_(100);
  StatsAccumulator accumulator(cols, {.token_weights = random.one_in(2)});
  accumulator.add(inputs.unsqueeze(0), /*holdout=*/false);
  return {at::randn({rows, cols}) * 0.05, accumulator.finish()};
}

class SoakLinear : public testing::TestWithParam<uint64_t> {};

TEST_P(SoakLinear, IsDecodedToTheWeightsThatWereChosen) {
  Random random(GetParam());
  const RandomLinear linear = random_linear(random);
  const Method method = test::random_method(random);
  const Scheme scheme = test::fitting(test::random_scheme(random), method);
  const BinarizedWeight chosen = quantize_linear(linear.weight, linear.stats, method, {.scheme = scheme});
  const test::ScratchDirectory directory;
  const fs::path path = directory / "linear.safetensors";
  PackedWriter writer(path, /*force=*/false);
  writer.add_linear("linear", pack_weight(chosen, "linear"));
  writer.set_metadata("config", "{}");
  writer.finish();
  writer.commit();
  EXPECT_TRUE(decode_naively(*SafetensorsFile::open(path), "linear").equal(chosen.to_dense()))
      << test::describe(layout_of(chosen));
  expect_file_is_sound(path, random);
}

TEST_P(SoakLinear, LosesNothingByRefitAndDescend) {
  Random random(GetParam());
  const RandomLinear linear = random_linear(random);
  LeanMethod method;
  method.column_block = static_cast<int>(16 * random.between(1, 16));
  method.scale_bits = random.any_of({4, 5, 6, 16});
  const Scheme scheme = test::fitting(test::random_scheme(random), method);
  LeanWeight lean;
  lean.nm = scheme.nm;
  lean.column_block = method.column_block;
  lean.scale_bits = method.scale_bits;
  lean.target = linear.weight.t().contiguous();
  lean.hessian = shrink_hessian(linear.stats.hessian, random.any_of({0.0, 0.1}));
  const auto compensate = random.any_of({Compensate::kNone, Compensate::kBlock, Compensate::kColumn});
  initialize_scales(lean, scheme.levels, lean.hessian.diagonal().contiguous());
  encode_columns(lean, inverse_factor(lean.hessian, 0.01).upper, compensate);
  // The steps decide with float32 products of weights and H, whose rounding is that of tr(W H W^T), and
  // compare sums that are as large as the error itself: 2^-20 of the one and 1e-5 of the other, as in
  // tests/quantize.
  const double energy = (lean.hessian.mm(lean.target) * lean.target).sum().item<double>();
  double before = lean.error();
  for (int round = 0; round < 3; ++round) {
    refit(lean, /*with_levels=*/round != 1);
    const double fitted = lean.error();
    EXPECT_LE(fitted, before * (1 + 1e-5) + 0x1p-20 * energy) << "refit, round " << round;
    descend(lean);
    before = lean.error();
    EXPECT_LE(before, fitted * (1 + 1e-5) + 0x1p-20 * energy) << "descend, round " << round;
  }
}

// --- a whole model ------------------------------------------------------------------------------

/// Asks for an interruption after some seconds, unless it goes out of scope before.
class Interrupter {
 public:
  explicit Interrupter(double seconds)
      : thread_([this, seconds] {
          std::unique_lock lock(mutex_);
          if (!over_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return done_; }))
            request_interrupt();
        }) {}
  ~Interrupter() {
    {
      const std::lock_guard lock(mutex_);
      done_ = true;
    }
    over_.notify_one();
    thread_.join();
    try {
      check_interrupt();  // takes back a request that came too late
    } catch (const Error&) {
    }
  }
  Interrupter(const Interrupter&) = delete;
  Interrupter& operator=(const Interrupter&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable over_;
  bool done_ = false;
  std::thread thread_;
};

class SoakModel : public testing::TestWithParam<uint64_t> {
 protected:
  SoakModel() {
    test::write_checkpoint(scratch_ / "checkpoint", case_.model);
    text_ = test::write_calibration_text(scratch_.path());
    auto* budget = std::get_if<BudgetAllocation>(&case_.recipe.model.allocation);
    while (budget != nullptr && !affordable()) budget->target_bpw *= 1.5;
  }

  /// Whether the target pays for the smallest schemes, outlier columns included.
  bool affordable() const {
    QuantizeOptions options;
    options.plan_only = true;
    options.blocks = case_.blocks;
    try {
      plan_quantization(checkpoint(), calibration(), case_.recipe, options);
      return true;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUsage) << error.what();
      return false;
    }
  }

  Checkpoint checkpoint() const { return Checkpoint::open(scratch_ / "checkpoint"); }
  Calibration calibration() const {
    return make_calibration(checkpoint(), text_, case_.samples, 0, case_.seqlen, case_.seed);
  }
  fs::path quantize(const std::string& name, int threads, bool dense = false, bool resume = false) const {
    const test::Threads scope(threads);
    QuantizeOptions options;
    options.output = scratch_ / name;
    options.dense_output = dense;
    options.resume = resume;
    options.blocks = case_.blocks;
    quantize_model(checkpoint(), calibration(), case_.recipe, options);
    return options.output;
  }
  /// Interrupted so many times, each time after at most so many seconds, and resumed.
  fs::path quantize_with_interruptions(const std::string& name, int count, double seconds,
                                       Random& random) const {
    const fs::path output = scratch_ / name;
    for (; count > 0; --count) {
      const Interrupter interrupter(random.share() * seconds);
      try {
        return quantize(name, 2, /*dense=*/false, /*resume=*/fs::exists(work_path(output)));
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::kInterrupted) << error.what();
        EXPECT_FALSE(fs::exists(output));
      }
    }
    return quantize(name, 2, /*dense=*/false, /*resume=*/fs::exists(work_path(output)));
  }
  /// The command for the program's own processes.
  std::vector<std::string> command(const std::string& name) const {
    const fs::path recipe = scratch_ / "recipe.json";
    test::write_text(recipe, case_.recipe.to_json().dump());
    std::vector<std::string> args = {"quantize",   (scratch_ / "checkpoint").string(),
                                     "-o",         (scratch_ / name).string(),
                                     "--calib",    text_,
                                     "--recipe",   recipe.string(),
                                     "--nsamples", std::to_string(case_.samples),
                                     "--seqlen",   std::to_string(case_.seqlen),
                                     "--seed",     std::to_string(case_.seed),
                                     "--threads",  "1"};
    if (case_.blocks > 0) args.insert(args.end(), {"--blocks", std::to_string(case_.blocks)});
    if (fs::exists(work_path(scratch_ / name))) args.emplace_back("--resume");
    return args;
  }

  test::RandomCase case_{GetParam()};
  test::ScratchDirectory scratch_;
  std::string text_;
  testing::ScopedTrace trace_{__FILE__, __LINE__, case_.describe()};
};

TEST_P(SoakModel, IsInTheFileAsItWasQuantizedHoweverTheRunWent) {
  Random random(GetParam());
  const auto started = std::chrono::steady_clock::now();
  const fs::path packed = quantize("one", 1);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  const std::string bytes = read_all(packed);
  expect_file_is_sound(packed, random);

  const auto dense = SafetensorsFile::open(quantize("dense", 1, /*dense=*/true) / "model.safetensors");
  const auto file = SafetensorsFile::open(packed);
  const json linears = json::parse(file->metadata().at("linears"));
  for (const auto& [name, layout] : linears.items()) {
    const TensorEntry& expected = dense->tensors().at(name + ".weight");
    ASSERT_EQ(expected.dtype, "F32");
    const at::Tensor decoded = decode_naively(*file, name);
    EXPECT_TRUE(std::ranges::equal(bytes_of(decoded), expected.data)) << name;
  }

  EXPECT_TRUE(read_all(quantize("two", 2)) == bytes) << "2 threads";
  if (!case_.recipe.training.any()) {  // which may round sums of gradients otherwise
    EXPECT_TRUE(read_all(quantize("three", 3)) == bytes) << "3 threads";
  }
  EXPECT_TRUE(read_all(quantize_with_interruptions("resumed", 3, seconds, random)) == bytes) << "resumed";
}

TEST_P(SoakModel, IsTheSameFromTwoProcessesAgainAndAfterTheLossOfOne) {
  if (std::string(STBLLM_BINARY).empty()) GTEST_SKIP() << "the program was not built";
  if (!ProcessGroup::supported()) GTEST_SKIP() << "built without Gloo (package libgloo-dev)";
  case_.recipe.training = {};  // trains in one process only
  case_.samples = std::max<int64_t>(case_.samples, 4);
  Random random(GetParam());
  const auto started = std::chrono::steady_clock::now();
  for (const test::Outcome& outcome : test::run_pair(command("undisturbed")))
    ASSERT_EQ(outcome.status, 0) << outcome.err;
  const std::chrono::duration<double> whole = std::chrono::steady_clock::now() - started;
  expect_file_is_sound(scratch_ / "undisturbed", random);
  {
    const test::Pair pair = test::start_pair(command("resumed"), command("resumed"));
    pair[0]->appears(work_path(scratch_ / "resumed"));  // when both have met
    std::this_thread::sleep_for(random.share() * whole);
    pair[random.between(0, 1)]->send(random.any_of({SIGKILL, SIGTERM}));
    for (const auto& process : pair) {
      const test::Outcome outcome = process->wait();
      EXPECT_TRUE(outcome.status == 0 || outcome.status == static_cast<int>(ErrorCode::kInterrupted) ||
                  outcome.status == -SIGKILL || outcome.status == -SIGTERM)  // before main() can say anything
          << outcome.status << ' ' << outcome.err;
    }
  }
  if (!fs::exists(scratch_ / "resumed")) {
    for (const test::Outcome& outcome : test::run_pair(command("resumed")))
      ASSERT_EQ(outcome.status, 0) << outcome.err;
  }
  EXPECT_TRUE(read_all(scratch_ / "resumed") == read_all(scratch_ / "undisturbed"));
}

/// What the sameness above rests on. On processors that are not Intel's MKL splits the sums of these without
/// make_products_reproducible().
TEST(SoakProducts, AreTheSameForAnyNumberOfThreads) {
  const at::Tensor a = at::randn({10, 10}, at::detail::createCPUGenerator(1)), b = at::ones({10, 30}) / 3;
  const auto multiply = [&](int threads) {
    const test::Threads scope(threads);
    return at::mm(a, b);
  };
  const at::Tensor alone = multiply(1);
  for (const int threads : {2, 3, 4}) EXPECT_TRUE(at::equal(multiply(threads), alone)) << threads;
}

// --- which cases --------------------------------------------------------------------------------

auto cases() {
  make_products_reproducible();   // as the program does, before the first product
  uint64_t first = 1, count = 2;  // together a few seconds
  if (const char* asked = std::getenv("STBLLM_SOAK")) std::istringstream(asked) >> first >> count;
  return testing::Range(first, first + count);
}

const auto kNumber = [](const auto& info) { return std::to_string(info.param); };
INSTANTIATE_TEST_SUITE_P(Case, SoakLinear, cases(), kNumber);
INSTANTIATE_TEST_SUITE_P(Case, SoakModel, cases(), kNumber);

}  // namespace
}  // namespace stbllm
