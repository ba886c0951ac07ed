// The third stage. It reads the plan, takes the streams through all blocks and leaves results of linears and
// blocks; the quantized stream is used up. The work directory keeps every finished block.

#include "stages.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/log.h"
#include "stbllm/base/profile.h"
#include "stbllm/calibrate/compare_streams.h"
#include "stbllm/calibrate/quantize_block.h"
#include "stbllm/train/tune.h"

namespace stbllm {
namespace {

double nominal_bits(const std::vector<LinearResult>& linears) {
  double bits = 0, weights = 0;
  for (const LinearResult& linear : linears) {
    const double count = static_cast<double>(linear.rows) * static_cast<double>(linear.cols);
    bits += count * linear.scheme.nm.density() * (1 + linear.salient_share);
    weights += count;
  }
  return bits / weights;
}

class BlockLoop {
 public:
  explicit BlockLoop(Run& run) : run_(run), progress_("quantize: linear", planned_linears(run)) {}

  void run() {
    // Distillation needs what leaves the dense model's last block, however few blocks are quantized.
    const int64_t blocks = run_.recipe().training.distill ? run_.spec().layers : run_.blocks();
    for (int64_t i = 0; i < blocks; ++i) {
      if (i >= run_.blocks()) {
        run_.dense->advance(*load(i));
        continue;
      }
      const QuantizedBlock quantized = finish(i);
      run_.result.linears.insert(run_.result.linears.end(), quantized.results.begin(),
                                 quantized.results.end());
      progress_.update(std::ssize(run_.result.linears));
      if (compares_blocks(run_.recipe(), run_.request.options)) compare(quantized);
    }
  }

 private:
  static int64_t planned_linears(const Run& run) {
    int64_t count = 0;
    for (int64_t i = 0; i < run.blocks(); ++i) count += std::ssize(planned(run.spec().linears(i), run.plan));
    return count;
  }

  std::shared_ptr<DecoderBlock> load(int64_t index) const {
    const StageTimer timer("load");
    return run_.decoder.block(index);
  }

  /// The quantized block, that of an earlier run or a new one. The streams are then behind it.
  QuantizedBlock finish(int64_t index) {
    const std::shared_ptr<DecoderBlock> block = load(index), dense_block = run_.dense ? load(index) : nullptr;
    const BlockStreams streams{.quantized = *run_.quantized,
                               .dense = run_.dense ? &*run_.dense : nullptr,
                               .dense_block = dense_block.get()};
    const ProcessGroup& group = run_.request.group;
    std::optional<QuantizedBlock> kept;
    if (run_.work) kept = run_.work->load(index);
    if (group.all_reduce(kept ? 1.0 : 0.0) > 0) {  // process 0 knows
      if (!kept) kept.emplace();
      const std::vector<LinearSpec> linears = planned(block->linears(), run_.plan);
      exchange(kept->linears, kept->results, linears, std::vector<int>(linears.size(), 0), group);
      install(*kept, *block, run_.spec());
      pass_block(*block, streams, run_.recipe().method);
      return std::move(*kept);
    }
    std::optional<HiddenStream> inputs;  // in front of the block, which tuning needs
    if (run_.recipe().training.tune) inputs.emplace(run_.quantized->copy());
    QuantizedBlock quantized = quantize(*block, streams, index);
    if (inputs) {
      tune(*dense_block, *inputs, quantized, index);
      install(quantized, *block, run_.spec());
      *run_.quantized = std::move(*inputs);
      pass_block(*block, {.quantized = *run_.quantized}, run_.recipe().method);
    }
    if (run_.work) run_.work->save(index, quantized);
    return quantized;
  }

  QuantizedBlock quantize(DecoderBlock& block, const BlockStreams& streams, int64_t index) {
    int64_t done = std::ssize(run_.result.linears);
    const auto on_linear = [&](const LinearResult& linear) {
      const LinearReport& report = linear.report;
      progress_.update(++done, fmt::format("block {}  error {:.4f}", index, report.output_error));
      check_interrupt();
      log::debug("{}: {} error {:.5f} held out {:.5f} shrink {:.2f} damping {:g} ({} retries) {:.2f} s",
                 linear.name, linear.scheme.str(), report.output_error, report.holdout_error, report.shrink,
                 report.damping, report.damping_retries, report.seconds);
    };
    return quantize_block(block, streams, run_.recipe().method, run_.plan, on_linear, run_.request.group);
  }

  /// The targets are the dense model's own hidden states: each block also mends what came before it. The
  /// dense block is used up.
  void tune(DecoderBlock& dense_block, const HiddenStream& inputs, QuantizedBlock& quantized, int64_t index) {
    const StageTimer timer("tune");
    const TuneReport report =
        tune_block(dense_block, run_.spec(), quantized, inputs, *run_.dense, *run_.recipe().training.tune);
    quantized.tune = report;
    log::info("block {}: reconstruction loss {:.5f} -> {:.5f} in {} epochs, {:.1f} % of symbols changed",
              index, report.loss_before, report.loss_after, report.epochs, 100 * report.changed);
  }

  void compare(const QuantizedBlock& quantized) {
    const StageTimer timer("compare");
    run_.result.blocks.push_back(compare_streams(*run_.quantized, *run_.dense, run_.request.group));
    run_.result.blocks.back().tune = quantized.tune;
  }

  Run& run_;
  log::Progress progress_;
};

}  // namespace

void quantize_blocks(Run& run) {
  BlockLoop(run).run();
  run.quantized.reset();
  run.result.nominal_bits = nominal_bits(run.result.linears);
  run.request.group.all_reduce(0.0);  // nobody leaves while another one still waits for a block
}

}  // namespace stbllm
