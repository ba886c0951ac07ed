#include "stbllm/train/distill.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "stbllm/base/bits.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/log.h"
#include "stbllm/base/profile.h"
#include "stbllm/model/fused.h"
#include "stbllm/model/linear.h"
#include "stbllm/train/trained_block.h"

namespace stbllm {
namespace {

/// Seconds of training that an interruption may cost.
constexpr double kKeepAfter = 600;

/// One end of the comparison: normalised hidden states to logits.
struct Head {
  at::Tensor weight;  // (vocab, width) in the dtype of products
  explicit Head(const at::Tensor& table) : weight(table.to(fast_product_dtype(table.device()))) {}
  at::Tensor logits(const at::Tensor& x) const { return at::linear(x.to(weight.scalar_type()), weight); }
};

/// A block's inputs and outputs with what lies between them, for one step.
struct Passed {
  at::Tensor input, output;
};

/// Sum over tokens of KL(teacher || student) for x, y (tokens, width) in front of the heads, a number of
/// float64; with `gradient`, its derivative with respect to x goes there.
at::Tensor divergence(const Head& student, const at::Tensor& x, const Head& teacher, const at::Tensor& y,
                      at::Tensor* gradient) {
  at::Tensor sum = at::zeros({}, x.options().dtype(at::kDouble));
  for (int64_t first = 0; first < x.size(0); first += kTokensPerDivergence) {
    const int64_t count = std::min(kTokensPerDivergence, x.size(0) - first);
    at::Tensor by_logits;
    const at::Tensor rows = softmax_divergence(teacher.logits(y.narrow(0, first, count)),
                                               student.logits(x.narrow(0, first, count)),
                                               gradient != nullptr ? &by_logits : nullptr);
    sum += rows.sum(0, false, at::kDouble);
    if (gradient != nullptr) gradient->narrow(0, first, count).copy_(at::mm(by_logits, student.weight));
  }
  return sum;
}

/// The training of one model.
class Distillation {
 public:
  Distillation(const DistillRequest& request, TrainingStore& store)
      : student_(request.student),
        teacher_(request.teacher),
        states_(request.teacher_states),
        blocks_(request.blocks),
        stage_(request.stage),
        store_(store),
        positions_(student_.spec(), 0, states_.seqlen(), fast_product_dtype(states_.device()),
                   states_.device()),
        training_(states_.windows() - states_.holdout()),
        step_(windows_per_step(states_.seqlen())),
        total_steps_(ceil_div(training_, step_) * stage_.epochs),
        student_head_(student_.head()),
        teacher_head_(teacher_.head()) {
    const ModelSpec& spec = student_.spec();
    trained_.reserve(blocks_.size());
    for (int64_t i = 0; i < spec.layers; ++i) {
      layers_.push_back(student_.block(i));
      if (i < std::ssize(blocks_))
        trained_.emplace_back(*layers_.back(), spec, blocks_[i], /*train_codes=*/stage_.code_lr > 0);
    }
    if (spec.has_final_norm) outer_.add_norm(student_.final_norm(), spec.final_norm());
  }

  DistillReport run() {
    begin_or_resume();
    const char* judged = states_.holdout() > 0 ? "held-out" : "training";
    log::info("distill: divergence {:.4f} on the {} windows before", report_.divergence_before, judged);
    log::Progress progress("distill: step", total_steps_);
    for (; epoch_ <= stage_.epochs; ++epoch_, next_ = 0, sum_ = 0) {
      while (next_ < training_) {
        keep_state_if_due();
        const double started = seconds_now();
        train(next_, std::min(step_, training_ - next_));
        seconds_ += seconds_now() - started;
        trained_windows_ += std::min(step_, training_ - next_);
        next_ += step_;
        progress.update(++steps_, fmt::format("divergence {:.4f}",
                                              sum_ / static_cast<double>(std::min(next_, training_))));
      }
      const double divergence = judge();
      log::info("distill: epoch {} of {}: divergence {:.4f} in training, {:.4f} on the {} windows", epoch_,
                stage_.epochs, sum_ / static_cast<double>(training_), divergence, judged);
      if (divergence < report_.divergence_after) keep_result(divergence);
    }
    if (seconds_ > 0)
      report_.tokens_per_second = static_cast<double>(trained_windows_ * states_.seqlen()) / seconds_;
    return report_;
  }

 private:
  /// Hidden states that leave the last block; what autograd needs of every block goes to `tape` unless that
  /// is null.
  at::Tensor forward(int64_t first, int64_t count, std::vector<Passed>* tape) const {
    at::Tensor hidden = student_.embed(states_.ids().narrow(0, first, count));
    for (const auto& layer : layers_) {
      const at::AutoGradMode with_grad(tape != nullptr);
      if (tape != nullptr) hidden = hidden.detach().set_requires_grad(true);
      at::Tensor out = layer->forward(hidden, positions_);
      if (tape != nullptr) tape->push_back({.input = hidden, .output = out});
      hidden = out.detach();
    }
    return hidden;
  }

  /// What the teacher's head multiplies for these windows, (tokens, width).
  at::Tensor targets(int64_t first, int64_t count) const {
    return teacher_.before_head(states_.read(first, count)).flatten(0, 1);
  }

  /// Divergence per token of the student's hidden states for the windows from `first` on.
  double compare(const at::Tensor& hidden, int64_t first) const {
    const at::Tensor y = targets(first, hidden.size(0)), x = student_.before_head(hidden).flatten(0, 1);
    return divergence(student_head_, x, teacher_head_, y, nullptr).item<double>() /
           static_cast<double>(y.size(0));
  }

  /// The same, and its derivative with respect to `hidden`; the final norm gets its gradients.
  std::pair<double, at::Tensor> compare_with_gradient(const at::Tensor& hidden, int64_t first) const {
    const at::Tensor y = targets(first, hidden.size(0));
    const auto tokens = static_cast<double>(y.size(0));
    at::Tensor leaf = hidden.detach().set_requires_grad(true), x;
    {
      const at::AutoGradMode with_grad(true);
      x = student_.before_head(leaf);
    }
    at::Tensor x_gradient = at::empty({y.size(0), x.size(-1)}, x.options().dtype(at::kFloat));
    const at::Tensor sum = divergence(student_head_, x.detach().flatten(0, 1), teacher_head_, y, &x_gradient);
    {
      const at::AutoGradMode with_grad(true);
      x.backward(x_gradient.view_as(x) / tokens);
    }
    return {sum.item<double>() / tokens, leaf.grad()};
  }

  /// One step of Adam on `count` windows.
  void train(int64_t first, int64_t count) {
    const TuneRates rates = decayed({.gains = stage_.lr, .codes = stage_.code_lr}, steps_, total_steps_);
    // A weight takes two operations per token forwards, and four backwards.
    const auto tokens = static_cast<double>(count * states_.seqlen());
    const double pass = 2 * tokens * static_cast<double>(student_.spec().linear_weights());
    std::vector<Passed> tape;
    const at::Tensor hidden = [&] {
      const StageTimer timer("forward", pass);
      return forward(first, count, &tape);
    }();
    auto [loss, gradient] = [&] {
      const StageTimer timer("head", 6 * tokens * static_cast<double>(student_head_.weight.numel()));
      return compare_with_gradient(hidden, first);
    }();
    sum_ += loss * static_cast<double>(count);
    outer_.step(rates.gains);
    for (int64_t i = std::ssize(layers_) - 1; i >= 0; --i) {
      {
        const StageTimer timer("backward", 2 * pass / static_cast<double>(layers_.size()));
        tape.back().output.backward(gradient);
        gradient = tape.back().input.grad();
        tape.pop_back();
      }
      const StageTimer timer("latents");
      if (i < std::ssize(trained_)) trained_[i].step(rates);
    }
  }

  double judge() const {
    return held_out_mean(states_.windows(), states_.holdout(), step_, [&](int64_t first, int64_t count) {
      return compare(forward(first, count, nullptr), first);
    });
  }

  void keep_result(double divergence) {
    report_.divergence_after = divergence;
    report_.epochs = epoch_;
    report_.changed = 0;
    for (TrainedBlock& block : trained_)
      report_.changed += block.write_back() / static_cast<double>(trained_.size());
    outer_.write_back(blocks_.back().tensors);
  }

  void visit_state(const StateVisitor& visit) {
    for (TrainedBlock& block : trained_) block.visit_state(visit);
    outer_.visit_state(visit);
  }

  void keep_state() {
    const nlohmann::json progress = {
        {"report", report_}, {"steps", steps_}, {"windows", next_}, {"epoch", epoch_}, {"sum", sum_}};
    store_.save(progress, blocks_, [this](const StateVisitor& visit) { visit_state(visit); });
    last_kept_ = seconds_now();
  }

  void keep_state_if_due() {
    if (seconds_now() - last_kept_ > kKeepAfter) keep_state();
    try {
      check_interrupt();
    } catch (const Error&) {
      keep_state();
      throw;
    }
  }

  void begin_or_resume() {
    const auto kept = store_.load(blocks_, [this](const StateVisitor& visit) { visit_state(visit); });
    if (!kept) {
      report_.divergence_before = report_.divergence_after = judge();
      return;
    }
    report_ = kept->at("report");
    steps_ = kept->at("steps");
    next_ = kept->at("windows");
    epoch_ = kept->at("epoch");
    sum_ = kept->at("sum");
    for (TrainedBlock& block : trained_) block.resume(steps_);
    outer_.resume(steps_);
    log::info("distill: continued after {} steps", steps_);
  }

  Decoder& student_;
  const Decoder& teacher_;
  const HiddenStream& states_;
  std::vector<QuantizedBlock>& blocks_;
  const TrainingStage& stage_;
  TrainingStore& store_;
  const Positions positions_;  // in the dtype of products, which is what the student's branches compute in
  const int64_t training_, step_, total_steps_;  // windows, windows of a step, steps
  const Head student_head_, teacher_head_;
  std::vector<std::shared_ptr<DecoderBlock>> layers_;
  std::vector<TrainedBlock> trained_;
  TrainedVectors outer_;  // outside the blocks

  DistillReport report_;
  int epoch_ = 1;
  int64_t steps_ = 0, next_ = 0;  // steps that are done; the next window of this epoch
  double sum_ = 0;                // divergence of this epoch's windows
  double last_kept_ = seconds_now();
  double seconds_ = 0;  // of steps since the start, and the windows that they saw
  int64_t trained_windows_ = 0;
};

}  // namespace

DistillReport distill(const DistillRequest& request, TrainingStore& store) {
  const at::NoGradGuard no_grad;
  return Distillation(request, store).run();
}

}  // namespace stbllm
