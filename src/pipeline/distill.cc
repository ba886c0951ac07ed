#include "stbllm/pipeline/distill.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>

#include "stbllm/base/bits.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/log.h"
#include "stbllm/model/linear.h"
#include "stbllm/pipeline/spill.h"
#include "stbllm/pipeline/trained_block.h"

namespace stbllm {
namespace {

/// Seconds of training that an interruption may cost.
constexpr double kKeepAfter = 600;

/// One end of the comparison: normalised hidden states to logits.
struct Head {
  at::Tensor weight;  // (vocab, width) in the dtype of products
  explicit Head(const at::Tensor& table) : weight(table.to(fast_product_dtype())) {}
  at::Tensor logits(const at::Tensor& x) const {
    return at::linear(x.to(weight.scalar_type()), weight).to(at::kFloat);
  }
};

/// A block's inputs and outputs with what lies between them, for one step.
struct Passed {
  at::Tensor input, output;
};

/// Sum over tokens of KL(teacher || student) for x, y (tokens, width) in front of the heads; with `gradient`,
/// its derivative with respect to x goes there.
double divergence(const Head& student, const at::Tensor& x, const Head& teacher, const at::Tensor& y,
                  at::Tensor* gradient) {
  double sum = 0;
  for (int64_t first = 0; first < x.size(0); first += kTokensPerDivergence) {
    const int64_t count = std::min(kTokensPerDivergence, x.size(0) - first);
    const at::Tensor log_p = at::log_softmax(teacher.logits(y.narrow(0, first, count)), -1);
    const at::Tensor log_q = at::log_softmax(student.logits(x.narrow(0, first, count)), -1);
    const at::Tensor p = log_p.exp();
    sum += (p * (log_p - log_q)).sum(-1).sum(0, false, at::kDouble).item<double>();
    if (gradient != nullptr)
      gradient->narrow(0, first, count)
          .copy_(at::mm((log_q.exp() - p).to(student.weight.scalar_type()), student.weight));
  }
  return sum;
}

}  // namespace

DistillReport distill(Decoder& student, const Decoder& teacher, std::vector<QuantizedBlock>& blocks,
                      const at::Tensor& ids, const at::Tensor& teacher_hidden, int64_t holdout,
                      const Recipe& recipe, const WorkDirectory& work, const nlohmann::json& inputs) {
  const at::NoGradGuard no_grad;
  const ModelSpec& spec = student.spec();
  const int64_t windows = ids.size(0), seqlen = ids.size(1), training = windows - holdout;
  const Positions positions(spec, 0, seqlen, at::kFloat, at::kCPU);
  std::vector<std::shared_ptr<DecoderBlock>> layers;
  std::vector<TrainedBlock> trained;
  trained.reserve(blocks.size());
  for (int64_t i = 0; i < spec.layers; ++i) {
    layers.push_back(student.block(i));
    if (i < static_cast<int64_t>(blocks.size()))
      trained.emplace_back(*layers.back(), spec, blocks[i], /*train_codes=*/recipe.distill_code_lr > 0);
  }
  TrainedVectors outer;
  if (spec.has_final_norm) outer.add_norm(student.final_norm(), spec.final_norm());
  const Head student_head(student.head()), teacher_head(teacher.head());

  const auto forward = [&](int64_t first, int64_t count, std::vector<Passed>* tape) {
    at::Tensor hidden = student.embed(ids.narrow(0, first, count));
    for (const auto& layer : layers) {
      const at::AutoGradMode with_grad(tape != nullptr);
      if (tape != nullptr) hidden = hidden.detach().set_requires_grad(true);
      at::Tensor out = layer->forward(hidden, positions);
      if (tape != nullptr) tape->push_back({hidden, out});
      hidden = out.detach();
    }
    return hidden;
  };
  // Divergence per token; with `gradient`, of its derivative with respect to hidden too, and the final norm's
  // gradients.
  const auto compare = [&](const at::Tensor& hidden, int64_t first, at::Tensor* gradient) {
    const at::Tensor target = teacher_hidden.narrow(0, first, hidden.size(0)),
                     y = teacher.before_head(target.to(at::kFloat)).flatten(0, 1);
    release_spilled(target);
    const double tokens = static_cast<double>(y.size(0));
    if (gradient == nullptr)
      return divergence(student_head, student.before_head(hidden).flatten(0, 1), teacher_head, y, nullptr) /
             tokens;
    at::Tensor leaf = hidden.detach().set_requires_grad(true), x;
    {
      const at::AutoGradMode with_grad(true);
      x = student.before_head(leaf);
    }
    at::Tensor x_gradient = at::empty({y.size(0), x.size(-1)}, at::kFloat);
    const double sum = divergence(student_head, x.detach().flatten(0, 1), teacher_head, y, &x_gradient);
    {
      const at::AutoGradMode with_grad(true);
      x.backward(x_gradient.view_as(x) / tokens);
    }
    *gradient = leaf.grad();
    return sum / tokens;
  };
  const int64_t step = windows_per_step(seqlen);
  const auto judge = [&] {
    return held_out_mean(windows, holdout, step, [&](int64_t first, int64_t count) {
      return compare(forward(first, count, nullptr), first, nullptr);
    });
  };

  const auto visit_state = [&](const StateVisitor& visit) {
    for (TrainedBlock& block : trained) block.visit_state(visit);
    outer.visit_state(visit);
  };
  DistillReport report;
  int64_t done = 0, first = 0;  // steps; windows of this epoch
  int epoch = 1;
  double sum = 0;
  if (const auto kept = work.load_training(inputs, blocks, visit_state)) {
    report = kept->at("report");
    done = kept->at("steps");
    first = kept->at("windows");
    epoch = kept->at("epoch");
    sum = kept->at("sum");
    for (TrainedBlock& block : trained) block.resume(done);
    outer.resume(done);
    log::info("distill: continued after {} steps", done);
  } else {
    report.divergence_before = report.divergence_after = judge();
  }
  double last_kept = seconds_now();
  const auto keep = [&] {
    const nlohmann::json progress = {
        {"report", report}, {"steps", done}, {"windows", first}, {"epoch", epoch}, {"sum", sum}};
    work.save_training(inputs, progress, blocks, visit_state);
    last_kept = seconds_now();
  };
  const char* judged = holdout > 0 ? "held-out" : "training";
  log::info("distill: divergence {:.4f} on the {} windows before", report.divergence_before, judged);
  const int64_t steps_per_epoch = ceil_div(training, step),
                total_steps = steps_per_epoch * recipe.distill_epochs;
  log::Progress progress("distill: step", total_steps);
  for (; epoch <= recipe.distill_epochs; ++epoch, first = 0, sum = 0) {
    while (first < training) {
      if (seconds_now() - last_kept > kKeepAfter) keep();
      try {
        check_interrupt();
      } catch (const Error&) {
        keep();
        throw;
      }
      const TuneRates rates = decayed({recipe.distill_lr, recipe.distill_code_lr}, done, total_steps);
      const int64_t count = std::min(step, training - first);
      std::vector<Passed> tape;
      const at::Tensor hidden = forward(first, count, &tape);
      at::Tensor gradient;
      sum += compare(hidden, first, &gradient) * static_cast<double>(count);
      outer.step(rates.gains);
      for (int64_t i = spec.layers - 1; i >= 0; --i) {
        tape.back().output.backward(gradient);
        gradient = tape.back().input.grad();
        tape.pop_back();
        if (i < static_cast<int64_t>(trained.size())) trained[i].step(rates);
      }
      first += step;
      progress.update(++done,
                      fmt::format("divergence {:.4f}", sum / static_cast<double>(std::min(first, training))));
    }
    const double divergence = judge();
    log::info("distill: epoch {} of {}: divergence {:.4f} in training, {:.4f} on the {} windows", epoch,
              recipe.distill_epochs, sum / static_cast<double>(training), divergence, judged);
    if (divergence < report.divergence_after) {
      report.divergence_after = divergence;
      report.epochs = epoch;
      report.changed = 0;
      for (TrainedBlock& block : trained)
        report.changed += block.write_back() / static_cast<double>(trained.size());
      outer.write_back(blocks.back().tensors);
    }
  }
  return report;
}

}  // namespace stbllm
