#include "stbllm/pipeline/plan_model.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "stbllm/base/bits.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/log.h"
#include "stbllm/pipeline/pack_weight.h"
#include "stbllm/plan/allocate.h"
#include "stbllm/quantize/nm_select.h"

namespace stbllm {
namespace {

/// What `budget` chooses from: 0.5, 0.75, 0.875, 1.125, 1.375, 2 and 2.5 bits of codes per weight. They lie on
/// the lower hull of bits and squared error on normal weights; 2:4 with three levels, say, errs over 1.3 times as much as 3:4 with two.
constexpr std::array<Code, 7> kBudgetCodes = {{{{1, 8}, 1}, {{1, 4}, 1}, {{2, 8}, 1}, {{3, 8}, 1}, {{5, 8}, 1}, {{3, 4}, 2}, {{3, 4}, 3}}};
/// The one whose block error is measured: in the middle.
constexpr size_t kMeasuredCode = 3;
/// Tokens behind the plan's H; a quarter as many held-out ones judge.
constexpr int64_t kPlanTokens = 8192;
/// Where the recipe leaves it to held-out windows.
constexpr double kPlanShrink = 0.1;

/// L2 norm of the weights of each block.
std::vector<double> block_norms(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::vector<double> norms;
  for (int64_t i = 0; i < spec.layers; ++i) {
    double sum = 0;
    for (const LinearSpec& linear : spec.linears(i)) {
      const TensorSpec weight = linear.weight();
      sum += checkpoint.load(weight.name, weight.shape).to(at::kFloat).square().sum(1, false, at::kDouble).sum().item<double>();
      checkpoint.release(weight.name);
    }
    norms.push_back(std::sqrt(sum));
  }
  return norms;
}

/// Percent of scores |W_ij| S_j above 6x the mean score of their block, from a dense pass that takes `hidden` along.
std::vector<double> block_outlier_shares(const Decoder& decoder, at::Tensor& hidden, const ProcessGroup& group) {
  const ModelSpec& spec = decoder.spec();
  std::vector<double> shares;
  log::Progress progress("scores for the outlier allocation: block", spec.layers);
  for (int64_t i = 0; i < spec.layers; ++i) {
    check_interrupt();
    const auto block = decoder.block(i);
    std::array<at::Tensor, kTapCount> norm_sq;
    advance(*block, spec, hidden, [&](Tap tap, const at::Tensor& inputs, bool) {
      at::Tensor& sum = norm_sq[static_cast<size_t>(tap)];
      const at::Tensor squares = inputs.reshape({-1, inputs.size(-1)}).square().sum(0);
      sum = sum.defined() ? sum + squares : squares;
    });
    for (at::Tensor& sum : norm_sq)
      if (sum.defined()) group.all_reduce(sum = sum.cpu());
    double total = 0, above = 0;
    int64_t count = 0;
    std::vector<at::Tensor> scores;
    for (const LinearSpec& linear : block->linears()) {
      const at::Tensor weight = dynamic_cast<const DenseLinear&>(block->linear(linear.role)).weight().cpu();
      const at::Tensor weight_t = weight.t().contiguous();
      scores.push_back(ImportanceScore(weight_t, Importance::kWanda)(weight_t, norm_sq[static_cast<size_t>(linear.tap)], {}));
      total += scores.back().sum(1, false, at::kDouble).sum().item<double>();
      count += scores.back().numel();
    }
    const float threshold = static_cast<float>(6 * total / static_cast<double>(count));
    for (const at::Tensor& score : scores) above += score.gt(threshold).sum().item<double>();
    shares.push_back(100 * above / static_cast<double>(count));
    progress.update(i + 1);
  }
  return shares;
}

/// Windows from `first` on, of at least `tokens` tokens together, or all `count`.
at::Tensor some_windows(const at::Tensor& hidden, int64_t first, int64_t count, int64_t tokens) {
  return hidden.narrow(0, first, std::min(count, ceil_div(tokens, hidden.size(1))));
}

Recipe with_code(Recipe recipe, const Code& code) {
  recipe.nm = code.nm;
  recipe.levels = code.levels;
  return recipe;
}

Plan plan_by_budget(const Decoder& decoder, const at::Tensor& all, int64_t all_held_out, int64_t blocks, const Recipe& recipe,
                    const ProcessGroup& group) {
  const ModelSpec& spec = decoder.spec();
  const int64_t training = all.size(0) - all_held_out;
  const at::Tensor held_out = some_windows(all, training, all_held_out, kPlanTokens / 4);
  at::Tensor hidden = at::cat({some_windows(all, 0, training, kPlanTokens), held_out}).to(at::kFloat);
  const int64_t holdout = held_out.size(0), judged = holdout > 0 ? holdout : hidden.size(0);  // the last so many windows judge
  Plan plan = uniform_plan(spec, recipe);
  std::vector<std::string> names;
  std::vector<std::vector<Offer>> offers;
  log::Progress progress("plan: block", blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto block = decoder.block(i);
    const at::Tensor inputs = hidden.narrow(0, hidden.size(0) - judged, judged).clone();
    TapStats taps(block->linears(), recipe.token_weights);
    advance(*block, spec, hidden, [&](Tap tap, const at::Tensor& x, bool held) { taps.add(tap, x, held); }, holdout);
    const at::Tensor outputs = hidden.narrow(0, hidden.size(0) - judged, judged);
    const std::array<InputStats, kTapCount> stats = taps.finish(group);

    for (const LinearSpec& linear : block->linears()) {
      check_interrupt();
      const auto& dense = dynamic_cast<const DenseLinear&>(block->linear(linear.role));
      const at::Tensor weight = dense.weight(), bias = dense.bias();
      const at::ScalarType products = dense.product_dtype();
      std::vector<Offer> own;
      double unit = 0;
      for (size_t c = 0; c < kBudgetCodes.size(); ++c) {
        Recipe quick = with_code(recipe, kBudgetCodes[c]);
        quick.refit = quick.descend = 0;
        if (quick.shrink < 0) quick.shrink = kPlanShrink;
        LinearReport report;
        const BinarizedWeight binarized = quantize_linear(weight, stats[static_cast<size_t>(linear.tap)], quick, &report);
        own.push_back({pack_weight(binarized, linear.name).bytes(), report.holdout_error < 0 ? report.output_error : report.holdout_error});
        if (c != kMeasuredCode) continue;
        // Behind quantized blocks more columns might pass for outliers, and exceed the budget.
        plan.at(linear.name).max_outliers = binarized.has_outliers() ? static_cast<int>(binarized.outlier_columns.numel()) : 0;
        block->set_linear(linear.role, std::make_unique<DenseLinear>(binarized.to_dense().to(weight.device()), bias, products));
        unit = compare_hidden(run_block(*block, spec, inputs), outputs, group).relative_error / std::max(own.back().error, 1e-12);
        block->set_linear(linear.role, std::make_unique<DenseLinear>(weight, bias, products));
      }
      for (Offer& offer : own) offer.error *= unit;
      names.push_back(linear.name);
      offers.push_back(std::move(own));
    }
    progress.update(i + 1);
  }
  const double bytes = recipe.target_bpw / 8 * static_cast<double>(spec.linear_weights() / spec.layers * blocks);
  const std::vector<size_t> choice = allocate_by_budget(offers, static_cast<int64_t>(bytes));
  for (size_t i = 0; i < names.size(); ++i) plan.at(names[i]) = with_code(plan.at(names[i]), kBudgetCodes[choice[i]]);
  return plan;
}

}  // namespace

Plan plan_model(const Checkpoint& checkpoint, const Decoder& decoder, at::Tensor& hidden, int64_t holdout, int64_t blocks, const Recipe& recipe,
                const ProcessGroup& group) {
  const ModelSpec& spec = decoder.spec();
  if (recipe.allocation == Allocation::kBudget) return plan_by_budget(decoder, hidden, holdout, blocks, recipe, group);
  Plan plan = uniform_plan(spec, recipe);
  if (recipe.allocation == Allocation::kUniform) return plan;
  const std::vector<NmPattern> patterns = recipe.allocation == Allocation::kNorm
                                              ? allocate_by_norm(recipe.nm, block_norms(checkpoint, spec))
                                              : allocate_by_outliers(recipe.nm, block_outlier_shares(decoder, hidden, group));
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) plan.at(linear.name).nm = patterns[i];
  return plan;
}

BudgetWork budget_work(const ModelSpec& spec) {
  const auto linears = static_cast<int64_t>(spec.linears(0).size());
  return {static_cast<int64_t>(kBudgetCodes.size()), kPlanTokens + (1 + linears) * kPlanTokens / 4};
}

Plan uniform_plan(const ModelSpec& spec, const Recipe& recipe) {
  Plan plan;
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) plan[linear.name] = recipe;
  return plan;
}

std::string describe(const Plan& plan) {
  std::vector<Code> codes;
  for (const auto& [name, own] : plan) codes.push_back({own.nm, own.levels});
  return describe(codes);
}

}  // namespace stbllm
