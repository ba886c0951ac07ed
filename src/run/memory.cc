#include "stbllm/run/memory.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <numeric>

#include "stbllm/base/error.h"
#include "stbllm/base/heap.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/model/linear.h"
#include "stbllm/run/assemble.h"
#include "stbllm/run/tables.h"
#include "stbllm/train/distill.h"
#include "stbllm/train/trained_block.h"

namespace stbllm {
namespace {

constexpr int64_t kFloatBytes = 4, kLatentBytes = 2, kMeanBytes = 2;

/// In use: what has been freed will serve again.
int64_t resident_bytes() {
  release_freed_memory();
  std::ifstream file("/proc/self/statm");
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

/// Bytes of the tables at both ends as `policy` codes them; a value that stays a float takes `kept` bytes.
int64_t table_bytes(const ModelSpec& spec, const ModelPolicy& policy, int64_t kept) {
  const auto bits = [&](RowCoding coding) {
    return integer_bits(coding) > 0 ? integer_bits(coding) : 8 * kept;
  };
  const int64_t both = bits(policy.embedding) + (spec.tied_head ? 0 : bits(policy.head));
  return both * spec.vocab * spec.embedding_width / 8;
}

/// Adds up the stages of one run.
class MemoryModel {
 public:
  MemoryModel(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
              const QuantizeOptions& options, bool spill)
      : spec_(spec),
        recipe_(recipe),
        options_(options),
        windows_(std::ssize(calibration.windows)),
        calibrating_(windows_ - calibration.distill_only),
        seqlen_(calibration.seqlen()),
        quantized_blocks_(options.quantized_blocks(spec)),
        on_host_(options.device == "cpu"),
        in_memory_(!spill && on_host_),
        copies_products_(fast_product_dtype(calibration_device(options)) != at::kFloat) {
    for (const LinearSpec& linear : spec.linears(0)) {
      const int64_t count = linear.rows * linear.cols, square = linear.cols * linear.cols;
      weights_ += count;
      const int64_t drift = is_asymmetric(recipe.method)
                                ? square + (adds_to_hidden(linear.tap) ? spec.hidden * linear.cols : 0)
                                : 0;
      tap_bytes_[static_cast<size_t>(linear.tap)] =
          kFloatBytes * (square * (calibration.holdout > 0 ? 2 : 1) + drift);
      // On the host a Cholesky in float64 with what goes in, and H shrunk; of a device's at most H and U. For
      // each weight targets, gradients and dense values.
      constexpr int64_t kHostBytes = 28, kDeviceBytes = 8, kWeightBytes = 64;
      workspace_ =
          std::max(workspace_, (on_host_ ? kHostBytes : kDeviceBytes) * square + kWeightBytes * count);
    }
  }

  int64_t peak() const {
    int64_t peak = quantizing();
    if (recipe_.training.tune) peak = std::max(peak, tuning(*recipe_.training.tune));
    if (distils()) peak = std::max(peak, distilling(*recipe_.training.distill));
    if (!options_.dense_output) peak = std::max(peak, verifying());
    return peak;
  }

 private:
  bool distils() const { return recipe_.training.distill && quantized_blocks_ > 0; }

  int64_t stream_bytes(int64_t windows) const {
    return windows * seqlen_ * spec_.hidden * static_cast<int64_t>(c10::elementSize(kHiddenDtype));
  }
  int64_t dense_stream() const {
    if (!in_memory_ || !needs_dense_stream(recipe_, options_)) return 0;
    return stream_bytes(distils() ? windows_ : calibrating_);
  }
  int64_t streams() const { return (in_memory_ ? stream_bytes(calibrating_) : 0) + dense_stream(); }
  /// Both tables in float32, and the integers that they stand for.
  int64_t tables() const {
    return (spec_.tied_head ? 1 : 2) * kFloatBytes * spec_.vocab * spec_.embedding_width +
           table_bytes(spec_, recipe_.model, 0);
  }
  /// The intermediates of a pass: three times the width of the MLP, eight times that of the hidden states.
  int64_t pass() const {
    const int64_t tokens = std::max(seqlen_, kTokensPerPass);
    return tokens * (3 * spec_.ffn + 8 * spec_.hidden) * kFloatBytes;
  }
  /// A block's weights in float32 and, where that is another, in the dtype of products.
  int64_t product_bytes() const { return copies_products_ ? 2 : kFloatBytes; }
  int64_t dense_block() const { return (kFloatBytes + (copies_products_ ? product_bytes() : 0)) * weights_; }
  /// A symbol for each weight, and its share of the scales.
  int64_t quantized_block() const { return weights_ + weights_ / 8; }
  /// A latent value, where codes are trained the mean of its gradients, and what the forward pass uses, in
  /// the dtype of products.
  int64_t trained_block(const TrainingStage& stage) const {
    return (kLatentBytes + (stage.code_lr > 0 ? kMeanBytes : 0) + product_bytes()) * weights_;
  }
  /// Those of one block exist at a time, in the dtype of products.
  int64_t gradients() const { return product_bytes() * weights_; }
  /// What autograd keeps of one block between the forward and the backward pass of a step: the inputs and
  /// outputs of linears and of what lies between them in the dtype of products, hidden states in float32.
  int64_t kept_pass() const {
    const int64_t branches = (3 * spec_.ffn + 8 * spec_.hidden) * product_bytes(),
                  between = 3 * spec_.hidden * kFloatBytes;
    return std::max<int64_t>(seqlen_, kTokensPerStep) * (branches + between);
  }

  /// The statistics of all taps or, where they are taken tap by tap, of one.
  int64_t statistics() const {
    if (!on_host_) return 0;
    if (!is_sequential(recipe_.method))
      return std::accumulate(tap_bytes_.begin(), tap_bytes_.end(), int64_t{0});
    return *std::ranges::max_element(tap_bytes_);
  }
  /// What lies between the taps of a block: the inputs of two neighbouring taps, of each stream that goes tap
  /// by tap.
  int64_t tap_inputs() const {
    if (!is_sequential(recipe_.method) || !in_memory_) return 0;
    const int64_t streams = is_asymmetric(recipe_.method) ? 2 : 1;
    return streams * stream_bytes(calibrating_) / spec_.hidden * (spec_.hidden + spec_.ffn);
  }
  int64_t quantizing() const {
    const int64_t blocks = needs_dense_stream(recipe_, options_) ? 2 : 1;
    return tables() + streams() + tap_inputs() + blocks * dense_block() + quantized_block() + statistics() +
           std::max(workspace_, pass());
  }
  /// The quantized block and the one in training, with a copy of its inputs.
  int64_t tuning(const TrainingStage& stage) const {
    return tables() + streams() + (in_memory_ ? stream_bytes(calibrating_) : 0) + 2 * dense_block() +
           quantized_block() + trained_block(stage) + gradients() + 2 * kept_pass();
  }
  int64_t distilling(const TrainingStage& stage) const {
    const int64_t heads =
        copies_products_ ? 2 * product_bytes() * spec_.vocab * spec_.embedding_width : 0;  // of both models
    const int64_t logits = 4 * kTokensPerDivergence * spec_.vocab * product_bytes();
    const int64_t first_symbols = weights_;
    return 2 * tables() + heads + dense_stream() + spec_.layers * kept_pass() +
           std::max(logits, kept_pass()) + gradients() +
           quantized_blocks_ * (quantized_block() + first_symbols + trained_block(stage)) +
           (spec_.layers - quantized_blocks_) * dense_block();
  }
  /// The packed model, where dense blocks are float32, and its file, beside the quantizer's. A product with a
  /// float32 table makes a copy of it.
  int64_t verifying() const {
    const auto* regions = std::get_if<RegionMethod>(&recipe_.method);
    const double bits =
        regions != nullptr && regions->max_salient > 0 ? 3.5 : 2.5;  // at most, of the presets
    const auto planes = static_cast<int64_t>(static_cast<double>(quantized_blocks_ * weights_) * bits / 8);
    const int64_t dense_weights = (spec_.layers - quantized_blocks_) * weights_;
    const int64_t packed =
        planes + kFloatBytes * dense_weights + table_bytes(spec_, recipe_.model, kFloatBytes);
    const int64_t file = planes + 2 * dense_weights + table_bytes(spec_, recipe_.model, 2);
    const int64_t logits = 4 * kTokensPerVerification * spec_.vocab * kFloatBytes;
    return 2 * tables() + packed + file + dense_block() + quantized_block() + pass() + logits +
           (distils() ? quantized_blocks_ * quantized_block() : 0);
  }

  const ModelSpec& spec_;
  const Recipe& recipe_;
  const QuantizeOptions& options_;
  const int64_t windows_, calibrating_, seqlen_, quantized_blocks_;
  const bool on_host_, in_memory_, copies_products_;
  int64_t weights_ = 0, workspace_ = 0;  // of a block, of one linear
  std::array<int64_t, kTapCount> tap_bytes_{};
};

int64_t peak_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                    const QuantizeOptions& options, bool spill) {
  const int64_t peak = MemoryModel(spec, calibration, recipe, options, spill).peak();
  // What freed blocks leave between those in use, and the stacks and buffers of threads: 50 to 300 MB on
  // models of 0.3 to 135 M weights.
  constexpr int64_t kUnused = int64_t{64} << 20, kUnusedShare = 20;
  return resident_bytes() + peak + peak / kUnusedShare + kUnused;
}

}  // namespace

int64_t machine_memory() {
  int64_t bytes = static_cast<int64_t>(::sysconf(_SC_PHYS_PAGES)) * ::sysconf(_SC_PAGESIZE);
  // A container's own limit, unless the file says "max" or is not there.
  std::ifstream file("/sys/fs/cgroup/memory.max");
  if (int64_t limit = 0; file >> limit) bytes = std::min(bytes, limit);
  return bytes;
}

MemoryPlan plan_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                       const QuantizeOptions& options, int64_t machine) {
  const int64_t in_memory = peak_memory(spec, calibration, recipe, options, /*spill=*/false);
  const int64_t limit = options.max_memory > 0 ? options.max_memory : machine;
  if (in_memory <= limit) return {.peak_bytes = in_memory, .spill = false, .limit = limit};
  const int64_t spilled = peak_memory(spec, calibration, recipe, options, /*spill=*/true);
  if (options.max_memory > 0 && spilled > limit)
    fail(ErrorCode::kUsage,
         "--max-memory {}: about {} bytes are needed even with the hidden states in a file ({} without); "
         "allow more, or use fewer or shorter windows",
         options.max_memory, spilled, in_memory);
  return {.peak_bytes = spilled, .spill = true, .limit = limit};
}

MemoryPlan require_memory(const ModelSpec& spec, const Calibration& calibration, const Recipe& recipe,
                          const QuantizeOptions& options, int64_t machine) {
  const MemoryPlan plan = plan_memory(spec, calibration, recipe, options, machine);
  if (plan.peak_bytes > plan.limit)
    fail(
        ErrorCode::kOutOfMemory,
        "about {} bytes of memory are needed even with the hidden states in a file, and this machine has {}; "
        "use fewer or shorter windows, or name another limit with --max-memory",
        plan.peak_bytes, machine);
  return plan;
}

}  // namespace stbllm
