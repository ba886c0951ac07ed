#include "stbllm/pipeline/estimate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <numeric>

#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/heap.h"
#include "stbllm/eval/perplexity.h"
#include "stbllm/model/decoder.h"
#include "stbllm/pack/quantized_rows.h"
#include "stbllm/pack/structured_binary_matrix.h"
#include "stbllm/pipeline/assemble.h"
#include "stbllm/pipeline/distill.h"
#include "stbllm/pipeline/plan_model.h"
#include "stbllm/pipeline/quantize_block.h"
#include "stbllm/pipeline/trained_block.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

/// Windows that the measured forward pass sees: the first call of a product is slow, more are not needed.
constexpr size_t kMeasuredWindows = 2;

/// Names, shapes, checksums and results in the header of a packed file: for a linear with all its planes, for
/// another tensor, and for all else beside configuration and tokenizer.
constexpr int64_t kHeaderBytesPerLinear = 1600, kHeaderBytesPerTensor = 250, kHeaderBytes = 2048;

/// In use: what has been freed will serve again.
int64_t resident_bytes() {
  release_freed_memory();
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

double seconds_of(const std::function<void()>& work) {
  const double started = seconds_now();
  work();
  return seconds_now() - started;
}

int64_t dense_tensor_bytes(const Checkpoint& checkpoint, const TensorSpec& tensor, RowCoding coding) {
  const int64_t rows = tensor.shape[0], cols = tensor.shape.size() > 1 ? tensor.shape[1] : 1;
  if (coding == RowCoding::kFloat16) return 2 * rows * cols;
  if (coding == RowCoding::kInt8 || coding == RowCoding::kInt4) {
    const QuantizedRows::Layout layout{rows, cols, coding == RowCoding::kInt8 ? 8 : 4};
    return rows * (layout.code_row_bytes() + 2 * layout.column_blocks());
  }
  const auto bytes = static_cast<int64_t>(checkpoint.load(tensor.name, tensor.shape).nbytes());
  checkpoint.release(tensor.name);
  return bytes;
}

/// Of everything but the linears' weights, as `recipe` stores it. Tables that lose bits are float32 in a
/// dense checkpoint, norms and biases where they are trained.
int64_t other_tensor_bytes(const Checkpoint& checkpoint, const ModelSpec& spec, const Recipe& recipe,
                           bool dense_output) {
  const bool trained = recipe.tune_epochs > 0 || recipe.distill_epochs > 0;
  int64_t bytes = 0;
  for (const TensorSpec& tensor : spec.other_tensors()) {
    const RowCoding coding = row_coding(spec, recipe, tensor);
    if ((dense_output && coding != RowCoding::kKeep) || (trained && tensor.shape.size() == 1))
      bytes += 4 * std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    else
      bytes += dense_tensor_bytes(checkpoint, tensor, coding);
  }
  return bytes;
}

/// Bytes of the tables at both ends as `recipe` codes them; a value that stays a float takes `kept` bytes.
int64_t table_bytes(const ModelSpec& spec, const Recipe& recipe, int64_t kept) {
  const auto half_bytes = [&](RowCoding coding) {  // of a value
    return coding == RowCoding::kInt4 ? 1 : coding == RowCoding::kInt8 ? 2 : 2 * kept;
  };
  return (half_bytes(recipe.embedding) + (spec.tied_head ? 0 : half_bytes(recipe.head))) * spec.vocab *
         spec.embedding_width / 2;
}

int64_t peak_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                    const QuantizeOptions& options, bool spill) {
  const auto windows = static_cast<int64_t>(calibration.windows.size()),
             seqlen = static_cast<int64_t>(calibration.windows[0].size());
  const int64_t calibrating = windows - calibration.distill_only;
  const int64_t quantized_blocks = options.quantized_blocks(spec);
  const bool tuning = recipe.tune_epochs > 0, distilling = recipe.distill_epochs > 0 && quantized_blocks > 0;
  const int64_t window = seqlen * spec.hidden * static_cast<int64_t>(c10::elementSize(kHiddenDtype));
  const int64_t stream = calibrating * window;
  const int64_t dense_stream =
      needs_dense_stream(recipe, options) ? (distilling ? windows : calibrating) * window : 0;
  const bool on_host = options.device == "cpu", resident = !spill && on_host;
  const int64_t hidden = resident ? stream + dense_stream : 0;
  const int64_t tables = (spec.tied_head ? 1 : 2) * 4 * spec.vocab * spec.embedding_width;  // float32
  const int64_t tokens = std::max(seqlen, kTokensPerPass);
  const int64_t pass = tokens * (3 * spec.ffn + 8 * spec.hidden) * 4;

  int64_t weights = 0, workspace = 0;
  std::array<int64_t, kTapCount> tap_bytes{};
  for (const LinearSpec& linear : spec.linears(0)) {
    const int64_t count = linear.rows * linear.cols;
    weights += count;
    tap_bytes[static_cast<size_t>(linear.tap)] =
        4 * linear.cols * linear.cols * (calibration.holdout > 0 ? 2 : 1);
    // A Cholesky in float64 and what goes in, H shrunk, U (of a device's at most H and U); W, targets,
    // gradients, dense values.
    workspace = std::max(workspace, (on_host ? 28 : 8) * linear.cols * linear.cols + 64 * count);
  }
  const int64_t hessians = on_host ? std::accumulate(tap_bytes.begin(), tap_bytes.end(), int64_t{0}) : 0;
  // Weights in float32 and in the dtype of products; a symbol and its share of the scales.
  const bool copies = fast_product_dtype() != at::kFloat;
  const int64_t product_bytes = copies ? 2 : 4, dense_block = (copies ? 6 : 4) * weights;
  const int64_t quantized_block = weights + weights / 8;
  // A latent weight, its two moments, what the forward pass uses and its gradient; the last two are in the
  // dtype of products.
  const auto trained_block = [&](bool codes) { return (4 + (codes ? 8 : 0) + 2 * product_bytes) * weights; };
  // What autograd keeps of one block between the forward and the backward pass of a step; measured on
  // SmolLM2-135M.
  const bool windowed =
      spec.sliding_window > 0 && seqlen > spec.sliding_window;  // libtorch's attention takes a mask then
  const int64_t kept_pass =
      std::max<int64_t>(seqlen, kTokensPerStep) * (5 * spec.ffn + 12 * spec.hidden) * 4 +
      (windowed ? 8 * seqlen * seqlen : 0);

  int64_t peak = tables + hidden + dense_block + quantized_block + hessians + std::max(workspace, pass);
  if (tuning)  // the quantized block and the one in training
    peak = std::max(peak, tables + hidden + 2 * dense_block + quantized_block +
                              trained_block(recipe.tune_code_lr > 0) + 2 * kept_pass);
  if (distilling) {
    const int64_t heads =
        copies ? 2 * product_bytes * spec.vocab * spec.embedding_width : 0;  // of both models
    const int64_t logits = 6 * kTokensPerDivergence * spec.vocab * 4;
    peak = std::max(peak,
                    2 * tables + heads + (resident ? dense_stream : 0) + spec.layers * kept_pass +
                        std::max(logits, kept_pass) +
                        quantized_blocks * (quantized_block + weights +
                                            trained_block(recipe.distill_code_lr > 0)) +  // first symbols too
                        (spec.layers - quantized_blocks) * dense_block);
  }
  if (!options.dense_output) {
    // Verification: the packed model, where dense blocks are float32, and its file, beside the quantizer's. A
    // product with a float32 table makes a copy of it.
    const int64_t quantized =
        quantized_blocks * weights * (recipe.max_salient > 0 ? 28 : 20) / 64;  // 3.5 or 2.5 bits
    const int64_t packed =
        quantized + (spec.layers - quantized_blocks) * 4 * weights + table_bytes(spec, recipe, /*kept=*/4);
    const int64_t file =
        quantized + (spec.layers - quantized_blocks) * 2 * weights + table_bytes(spec, recipe, /*kept=*/2);
    const int64_t logits = 4 * kTokensPerVerification * spec.vocab * 4;
    peak = std::max(peak, 2 * tables + packed + file + dense_block + quantized_block + pass + logits +
                              (distilling ? quantized_blocks * quantized_block : 0));
  }
  // What freed blocks leave between those in use, and the stacks and buffers of threads: 50 to 300 MB on
  // models of 0.3 to 135 M weights.
  constexpr int64_t kUnused = int64_t{64} << 20;
  return resident_bytes() + peak + peak / 20 + kUnused;
}

}  // namespace

double bits_for_file(const Checkpoint& checkpoint, const Recipe& recipe, int64_t file_bytes) {
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  const auto as_metadata = [](const std::string& text) {
    return static_cast<int64_t>(nlohmann::json(text).dump().size());
  };
  const int64_t linears = spec.layers * static_cast<int64_t>(spec.linears(0).size());
  const int64_t header =
      as_metadata(checkpoint.config().dump()) +
      as_metadata(Tokenizer::load(checkpoint.directory())->serialize()) + kHeaderBytesPerLinear * linears +
      kHeaderBytesPerTensor * static_cast<int64_t>(spec.other_tensors().size()) + kHeaderBytes;
  const int64_t left =
      file_bytes - header - other_tensor_bytes(checkpoint, spec, recipe, /*dense_output=*/false);
  if (left <= 0)
    fail(ErrorCode::kUsage,
         "--target-size {}: embedding, norms, tokenizer and header alone take {} bytes; raise it, or store "
         "the embedding in fewer bits",
         file_bytes, file_bytes - left);
  return 8.0 * static_cast<double>(left) / static_cast<double>(spec.linear_weights());
}

MemoryPlan plan_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                       const QuantizeOptions& options) {
  const int64_t in_memory = peak_memory(spec, calibration, recipe, options, /*spill=*/false);
  if (options.max_memory <= 0 || in_memory <= options.max_memory) return {in_memory, false};
  const int64_t spilled = peak_memory(spec, calibration, recipe, options, /*spill=*/true);
  if (spilled > options.max_memory)
    fail(ErrorCode::kUsage,
         "--max-memory {}: about {} bytes are needed even with the hidden states in a file ({} without); "
         "allow "
         "more, or use fewer or shorter windows",
         options.max_memory, spilled, in_memory);
  return {spilled, true};
}

Estimate estimate_quantization(const Checkpoint& checkpoint, const Calibration& calibration,
                               const Recipe& recipe, const QuantizeOptions& options) {
  const at::NoGradGuard no_grad;
  recipe.validate();
  const at::Device device = calibration_device(options);
  Estimate estimate;
  estimate.peak_memory_bytes =
      plan_memory(ModelSpec::from_checkpoint(checkpoint), calibration, recipe, options).peak_bytes;
  const Decoder decoder =
      Decoder::from_checkpoint(checkpoint, {.product_dtype = fast_product_dtype(device), .device = device});
  const ModelSpec& spec = decoder.spec();
  check_windows(decoder, calibration.windows);
  const int64_t quantized_blocks = options.quantized_blocks(spec);
  check_budget(spec, recipe, quantized_blocks);

  // One linear of the widest tap, on the inputs of a few windows.
  const auto block = decoder.block(0);
  const std::vector<LinearSpec> linears = spec.linears(0);
  const LinearSpec& widest =
      *std::max_element(linears.begin(), linears.end(),
                        [](const LinearSpec& a, const LinearSpec& b) { return a.cols < b.cols; });
  const size_t windows = std::min(kMeasuredWindows, calibration.windows.size());
  const at::Tensor hidden =
      decoder.embed(ids_of(std::span(calibration.windows).first(windows))).to(at::kFloat);
  TapStats taps(linears, recipe.token_weights);
  const double statistics = seconds_of([&] {
    observe_block(*block, spec, hidden, /*holdout=*/0,
                  [&](Tap tap, const at::Tensor& inputs, bool held_out) { taps.add(tap, inputs, held_out); });
  });
  const double forward =
      seconds_of([&] { run_block(*block, spec, hidden).sum().item<float>(); });  // a device has finished then
  InputStats stats = taps.finish()[static_cast<size_t>(widest.tap)];
  if (calibration.holdout > 0)
    stats.holdout_hessian = stats.hessian;  // the choice of the shrinkage costs time too
  LinearReport report;
  const at::Tensor original = block->dense(widest.role).weight();
  const BinarizedWeight weight = quantize_linear(original, stats, recipe, &report);

  const double salient_share = weight.salient_share();
  const int64_t outliers = weight.has_outliers() ? weight.outlier_columns.numel() : 0;
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) {
      if (i >= quantized_blocks || options.dense_output) {
        estimate.dense_bytes += options.dense_output && i < quantized_blocks
                                    ? 4 * linear.rows * linear.cols
                                    : dense_tensor_bytes(checkpoint, linear.weight(), RowCoding::kKeep);
        continue;
      }
      Layout layout{linear.rows,   linear.cols,         recipe.nm,
                    recipe.levels, recipe.column_block, recipe.scale_bits};
      layout.salient = std::llround(salient_share * static_cast<double>(linear.cols));
      layout.outliers = std::min(outliers, linear.cols);
      estimate.linear_bytes += layout_bytes(layout);
    }
  if (recipe.allocation == Allocation::kBudget && !options.dense_output)
    estimate.linear_bytes =
        static_cast<int64_t>(recipe.target_bpw / 8 * static_cast<double>(spec.linear_weights()) *
                             static_cast<double>(quantized_blocks) / static_cast<double>(spec.layers));
  estimate.dense_bytes += other_tensor_bytes(checkpoint, spec, recipe, options.dense_output);
  estimate.exact = options.dense_output || (recipe.max_salient == 0 && recipe.max_outliers == 0 &&
                                            recipe.allocation == Allocation::kUniform);

  // Per window and per weight. Measured on SmolLM2-135M: a tuned epoch takes 4.1 forward passes of its block,
  // a distilled one 4.7 of the model.
  constexpr double kPassesPerTunedEpoch = 4.1, kPassesPerDistilledEpoch = 4.7;
  const double all =
      static_cast<double>(calibration.windows.size()) / static_cast<double>(windows);  // of the measured ones
  const double calibrating =
      all - static_cast<double>(calibration.distill_only) / static_cast<double>(windows);
  const double layers = static_cast<double>(spec.layers), own = static_cast<double>(quantized_blocks);
  const double passes =
      calibrating * own * (1 + kPassesPerTunedEpoch * recipe.tune_epochs) +
      (needs_dense_stream(recipe, options) ? (recipe.distill_epochs > 0 ? all : calibrating) * layers : 0) +
      all * layers * kPassesPerDistilledEpoch * recipe.distill_epochs;
  const double weights = static_cast<double>(spec.linear_weights()) * static_cast<double>(quantized_blocks) /
                         static_cast<double>(spec.layers);
  if (recipe.allocation == Allocation::kBudget) {
    Recipe quick = recipe;
    quick.refit = quick.descend = 0;
    const auto [codes, tokens] = budget_work(spec);
    const double code = seconds_of([&] { quantize_linear(original, stats, quick); });
    const double measured = static_cast<double>(hidden.size(0) * hidden.size(1));
    estimate.seconds += static_cast<double>(codes) * code * static_cast<double>(spec.linear_weights()) /
                            static_cast<double>(widest.rows * widest.cols) +
                        layers * forward * static_cast<double>(tokens) / measured;
  }
  estimate.seconds += calibrating * statistics * own + forward * passes +
                      report.seconds * weights / static_cast<double>(widest.rows * widest.cols);
  return estimate;
}

}  // namespace stbllm
