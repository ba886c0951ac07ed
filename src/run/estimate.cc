#include "stbllm/run/estimate.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <numeric>
#include <optional>

#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/calibrate/head_hessian.h"
#include "stbllm/calibrate/pack_weight.h"
#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/calibrate/tap_stats.h"
#include "stbllm/model/decoder.h"
#include "stbllm/model/hidden_stream.h"
#include "stbllm/pack/quantized_rows.h"
#include "stbllm/pack/structured_binary_matrix.h"
#include "stbllm/plan/budget.h"
#include "stbllm/plan/plan_model.h"
#include "stbllm/run/memory.h"
#include "stbllm/run/tables.h"
#include "stbllm/text/tokenizer.h"

namespace stbllm {
namespace {

/// Windows that the measured forward pass sees: the first call of a product is slow, more are not needed.
constexpr int64_t kMeasuredWindows = 2;

/// Names, shapes, checksums and results in the header of a packed file: for a linear with all its planes, for
/// another tensor, and for all else beside configuration and tokenizer.
constexpr int64_t kHeaderBytesPerLinear = 1600, kHeaderBytesPerTensor = 250, kHeaderBytes = 2048;

/// Per window and per weight, measured on SmolLM2-135M: a tuned epoch takes so many forward passes of its
/// block, a distilled one so many of the model's blocks, and three products with its head.
constexpr double kPassesPerTunedEpoch = 4.1, kPassesPerDistilledEpoch = 4;

double seconds_of(const std::function<void()>& work) {
  const double started = seconds_now();
  work();
  return seconds_now() - started;
}

int64_t tensor_bytes(const Checkpoint& checkpoint, const TensorSpec& tensor, RowCoding coding) {
  const int64_t rows = tensor.shape[0], cols = tensor.shape.size() > 1 ? tensor.shape[1] : 1;
  if (coding == RowCoding::kFloat16) return 2 * rows * cols;
  if (integer_bits(coding) > 0) {
    const QuantizedRows::Layout layout{rows, cols, integer_bits(coding)};
    return rows * (layout.code_row_bytes() + 2 * layout.column_blocks());
  }
  const auto bytes = static_cast<int64_t>(checkpoint.load(tensor.name, tensor.shape).nbytes());
  checkpoint.release(tensor.name);
  return bytes;
}

/// Of everything but the linears' weights, as `policy` stores it. Tables that lose bits are float32 in a
/// dense checkpoint, norms and biases where they are `trained`.
int64_t other_tensor_bytes(const Checkpoint& checkpoint, const ModelSpec& spec, const ModelPolicy& policy,
                           bool trained, bool dense_output) {
  int64_t bytes = 0;
  for (const TensorSpec& tensor : spec.other_tensors()) {
    const RowCoding coding = row_coding(spec, policy, tensor);
    if ((dense_output && coding != RowCoding::kKeep) || (trained && tensor.shape.size() == 1))
      bytes += 4 * std::accumulate(tensor.shape.begin(), tensor.shape.end(), int64_t{1}, std::multiplies<>());
    else
      bytes += tensor_bytes(checkpoint, tensor, coding);
  }
  return bytes;
}

/// The plan that was given, or what is known of the one that will be made.
Plan known_plan(const ModelSpec& spec, const Recipe& recipe, const QuantizeOptions& options) {
  if (!options.plan.is_null()) return plan_from_json(options.plan, spec);
  Plan plan = uniform_plan(spec, usual_scheme(recipe.model.allocation));
  apply_rules(plan, recipe.model);
  return plan;
}

/// Measures on block 0 and extrapolates.
class Estimator {
 public:
  Estimator(const Checkpoint& checkpoint, const Calibration& calibration, const Recipe& recipe,
            const QuantizeOptions& options, const Decoder& decoder)
      : checkpoint_(checkpoint),
        calibration_(calibration),
        recipe_(recipe),
        options_(options),
        spec_(decoder.spec()),
        blocks_(options.quantized_blocks(spec_)),
        plan_(known_plan(spec_, recipe, options)),
        linears_(spec_.linears(0)),
        windows_(std::min(kMeasuredWindows, std::ssize(calibration.windows))) {
    measure(decoder);
  }

  Estimate estimate() const {
    Estimate result;
    if (!options_.dense_output) result.linear_bytes = packed_linear_bytes();
    result.dense_bytes =
        dense_linear_bytes() +
        other_tensor_bytes(checkpoint_, spec_, recipe_.model, recipe_.training.any(), options_.dense_output);
    result.exact = options_.dense_output || bytes_follow_from_layouts();
    result.stages = stages();
    for (const ExpectedStage& stage : result.stages) result.seconds += stage.seconds;
    result.dense_window_seconds =
        static_cast<double>(spec_.layers) * forward_seconds_ / static_cast<double>(windows_);
    result.distilled_window_seconds = passes_per_distilled_epoch() * result.dense_window_seconds;
    return result;
  }

 private:
  void measure(const Decoder& decoder) {
    const auto block = decoder.block(0);
    const HiddenStream stream(decoder, ids_of(std::span(calibration_.windows).first(windows_)), {});
    measured_tokens_ = stream.tokens();
    TapStats taps(linears_, stats_options(recipe_.method));
    // A device works in the order of what it is given, and is done when a number comes back.
    const at::Tensor last = at::zeros({1}, at::TensorOptions().device(decoder.device()));
    stream.outputs(*block).sum().item<float>();  // libtorch prepares what it does for the first time
    forward_seconds_ = seconds_of([&] { stream.outputs(*block).sum().item<float>(); });
    statistics_seconds_ = seconds_of([&] {
      stream.observe(*block, observer_of(taps));
      last.item<float>();
    });
    measure_linears(*block, taps.finish());
  }

  /// Quantizes the linear with most rows of each width.
  void measure_linears(const DecoderBlock& block, std::array<InputStats, kTapCount> stats) {
    std::map<int64_t, LinearSpec> of_width;
    for (const LinearSpec& linear : linears_) {
      const auto [found, first] = of_width.try_emplace(linear.cols, linear);
      if (!first && linear.rows > found->second.rows) found->second = linear;
    }
    for (const auto& [width, linear] : of_width) {
      InputStats& inputs = stats[static_cast<size_t>(linear.tap)];
      if (calibration_.holdout > 0) inputs.holdout_hessian = inputs.hessian;  // its errors cost time too
      measured_.emplace(width, measure_linear(linear, block.dense(linear.role).weight(), inputs));
    }
  }

  struct MeasuredLinear {
    double weights = 0, salient_share = 0;
    int64_t outliers = 0;
    double seconds = 0;
    double trial_seconds = 0;  ///< of all that a budget tries
  };

  MeasuredLinear measure_linear(const LinearSpec& linear, const at::Tensor& original,
                                const InputStats& inputs) const {
    const LinearPlan plan{.scheme = usual_scheme(recipe_.model.allocation)};
    LinearReport report;
    LeanMetrics metrics;  // which linears of a tap and their trials share
    const BinarizedWeight weight = quantize_linear(original, inputs, recipe_.method, plan, &report, &metrics);
    MeasuredLinear result{.weights = static_cast<double>(linear.rows * linear.cols),
                          .salient_share = weight.salient_share(),
                          .outliers = weight.has_outliers() ? weight.outlier_columns.numel() : 0,
                          .seconds = report.seconds};
    if (!plans_by_budget()) return result;
    std::optional<LinearTrial> trial;
    const double before = seconds_of([&] { trial.emplace(original, inputs, recipe_.method, metrics); });
    result.trial_seconds = before + seconds_of([&] {
                             double error = 0;
                             for (const Scheme& scheme : budget_work(spec_).schemes)
                               trial->quantize(scheme, error);
                           });
    return result;
  }

  bool plans_by_budget() const {
    return options_.plan.is_null() && std::holds_alternative<BudgetAllocation>(recipe_.model.allocation);
  }

  /// Of all linears of a block, each as long as those of its width took for each weight.
  double seconds_of_linears(double MeasuredLinear::*seconds) const {
    double sum = 0;
    for (const LinearSpec& linear : linears_) {
      const MeasuredLinear& measured = measured_.at(linear.cols);
      sum += measured.*seconds * static_cast<double>(linear.rows * linear.cols) / measured.weights;
    }
    return sum;
  }

  /// Stands in for the dense model where the method compares with it: the work does not depend on values.
  HiddenStream::Observer observer_of(TapStats& taps) const {
    if (!is_asymmetric(recipe_.method)) return taps.observer();
    return [&](Tap tap, const at::Tensor& inputs, bool held_out) {
      Drift drift{.inputs = inputs, .hidden = {}};
      if (adds_to_hidden(tap))
        drift.hidden = at::ones({inputs.size(0), inputs.size(1), spec_.hidden}, inputs.options());
      taps.add(tap, inputs, held_out, drift);
    };
  }

  int64_t packed_linear_bytes() const {
    if (plans_by_budget()) return budget_bytes(spec_, recipe_.model, blocks_);
    int64_t bytes = 0;
    for (int64_t i = 0; i < blocks_; ++i)
      for (const LinearSpec& linear : planned(spec_.linears(i), plan_)) {
        Layout layout = layout_of(linear, plan_.at(linear.name).scheme, recipe_.method);
        const MeasuredLinear& measured = measured_.at(linear.cols);
        layout.salient = std::llround(measured.salient_share * static_cast<double>(linear.cols));
        layout.outliers = measured.outliers;
        bytes += layout_bytes(layout);
      }
    return bytes;
  }

  /// Of linears that stay dense, or that become dense again.
  int64_t dense_linear_bytes() const {
    int64_t bytes = 0;
    for (int64_t i = 0; i < spec_.layers; ++i)
      for (const LinearSpec& linear : spec_.linears(i)) {
        if (i >= blocks_ || !plan_.contains(linear.name))
          bytes += tensor_bytes(checkpoint_, linear.weight(), RowCoding::kKeep);
        else if (options_.dense_output)
          bytes += 4 * linear.rows * linear.cols;
      }
    return bytes;
  }

  bool bytes_follow_from_layouts() const {
    const auto* pattern = std::get_if<PatternAllocation>(&recipe_.model.allocation);
    if (pattern == nullptr || pattern->vary != PatternAllocation::Vary::kNot) return false;
    const auto* lean = std::get_if<LeanMethod>(&recipe_.method);
    return lean != nullptr ? !lean->outliers : std::get<RegionMethod>(recipe_.method).max_salient == 0;
  }

  /// Of all blocks. Products with the head count by their size.
  double passes_per_distilled_epoch() const {
    return kPassesPerDistilledEpoch + 3 * static_cast<double>(spec_.vocab * spec_.embedding_width) /
                                          static_cast<double>(spec_.linear_weights());
  }

  /// By the names with which log::Progress speaks of them; "prepare", in front of the plan, shows none.
  std::vector<ExpectedStage> stages() const {
    const auto& [tune, distill] = recipe_.training;
    // In units of the measured windows.
    const double all = static_cast<double>(calibration_.windows.size()) / static_cast<double>(windows_);
    const double calibrating =
        all - static_cast<double>(calibration_.distill_only) / static_cast<double>(windows_);
    const auto layers = static_cast<double>(spec_.layers), own = static_cast<double>(blocks_);
    const double measured = static_cast<double>(measured_tokens_);

    double prepare = 0, plan = 0, distilling = 0;
    if (needs_head_hessian(spec_, recipe_.model))
      prepare = static_cast<double>(kHeadTokens) / measured * layers * forward_seconds_;
    if (plans_by_budget()) {
      const BudgetWork work = budget_work(spec_);
      plan = own * (seconds_of_linears(&MeasuredLinear::trial_seconds) +
                    statistics_seconds_ * static_cast<double>(work.observed_tokens) / measured +
                    forward_seconds_ * static_cast<double>(work.judging_tokens) / measured);
    }
    // Statistics are taken on the way through a block; where that is not from tap to tap, its outputs follow.
    double passes =
        calibrating * own *
        ((is_sequential(recipe_.method) ? 0 : 1) + kPassesPerTunedEpoch * (tune ? tune->epochs : 0));
    if (needs_dense_stream(recipe_, options_)) passes += (distill ? all : calibrating) * layers;
    const double quantizing = calibrating * statistics_seconds_ * own + forward_seconds_ * passes +
                              seconds_of_linears(&MeasuredLinear::seconds) * own;
    if (distill)
      distilling = forward_seconds_ * all * layers * passes_per_distilled_epoch() * distill->epochs;
    return {{"prepare", prepare}, {"plan", plan}, {"quantize", quantizing}, {"distill", distilling}};
  }

  const Checkpoint& checkpoint_;
  const Calibration& calibration_;
  const Recipe& recipe_;
  const QuantizeOptions& options_;
  const ModelSpec& spec_;
  const int64_t blocks_;
  const Plan plan_;
  const std::vector<LinearSpec> linears_;
  const int64_t windows_;
  int64_t measured_tokens_ = 0;
  double statistics_seconds_ = 0, forward_seconds_ = 0;
  std::map<int64_t, MeasuredLinear> measured_;  // by columns
};

}  // namespace

double bits_for_file(const Checkpoint& checkpoint, const ModelPolicy& policy, int64_t file_bytes) {
  const ModelSpec spec = ModelSpec::from_checkpoint(checkpoint);
  const auto as_metadata = [](const std::string& text) {
    return static_cast<int64_t>(nlohmann::json(text).dump().size());
  };
  const int64_t linears = spec.layers * std::ssize(spec.linears(0));
  const int64_t header = as_metadata(checkpoint.config().dump()) +
                         as_metadata(Tokenizer::load(checkpoint.directory())->serialize()) +
                         kHeaderBytesPerLinear * linears +
                         kHeaderBytesPerTensor * std::ssize(spec.other_tensors()) + kHeaderBytes;
  int64_t kept = 0;
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i))
      if (policy.keeps(linear.name)) kept += tensor_bytes(checkpoint, linear.weight(), RowCoding::kKeep);
  const int64_t left = file_bytes - header - kept -
                       other_tensor_bytes(checkpoint, spec, policy, /*trained=*/false,
                                          /*dense_output=*/false);
  if (left <= 0)
    fail(ErrorCode::kUsage,
         "--target-size {}: embedding, norms, kept linears, tokenizer and header alone take {} bytes; raise "
         "it, or store the embedding in fewer bits",
         file_bytes, file_bytes - left);
  return 8.0 * static_cast<double>(left) / static_cast<double>(quantized_weights(spec, policy, spec.layers));
}

Estimate estimate_quantization(const Checkpoint& checkpoint, const Calibration& calibration,
                               const Recipe& recipe, const QuantizeOptions& options) {
  const at::NoGradGuard no_grad;
  recipe.validate();
  const at::Device device = calibration_device(options);
  const int64_t peak =
      plan_memory(ModelSpec::from_checkpoint(checkpoint), calibration, recipe, options).peak_bytes;
  const Decoder decoder =
      Decoder::from_checkpoint(checkpoint, {.product_dtype = fast_product_dtype(device), .device = device});
  check_windows(decoder.spec(), calibration.windows);
  check_plan(decoder.spec(), recipe, options);
  Estimate estimate = Estimator(checkpoint, calibration, recipe, options, decoder).estimate();
  estimate.peak_memory_bytes = peak;
  return estimate;
}

}  // namespace stbllm
