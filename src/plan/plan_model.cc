#include "stbllm/plan/plan_model.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/plan/allocate.h"
#include "stbllm/plan/budget.h"
#include "stbllm/quantize/nm_select.h"

namespace stbllm {
namespace {

/// L2 norm of the weights of each block.
std::vector<double> block_norms(const Checkpoint& checkpoint, const ModelSpec& spec) {
  std::vector<double> norms;
  for (int64_t i = 0; i < spec.layers; ++i) {
    double sum = 0;
    for (const LinearSpec& linear : spec.linears(i)) {
      const TensorSpec weight = linear.weight();
      sum += checkpoint.load(weight.name, weight.shape)
                 .to(at::kFloat)
                 .square()
                 .sum(1, false, at::kDouble)
                 .sum()
                 .item<double>();
      checkpoint.release(weight.name);
    }
    norms.push_back(std::sqrt(sum));
  }
  return norms;
}

/// Percent of scores |W_ij| S_j above 6x the mean score of their block, from a dense pass that takes `hidden`
/// along.
std::vector<double> block_outlier_shares(const Decoder& decoder, HiddenStream& stream,
                                         const ProcessGroup& group) {
  const ModelSpec& spec = decoder.spec();
  std::vector<double> shares;
  log::Progress progress("plan: scores of block", spec.layers);
  for (int64_t i = 0; i < spec.layers; ++i) {
    const auto block = decoder.block(i);
    std::array<at::Tensor, kTapCount> norm_sq;
    stream.advance(*block, [&](Tap tap, const at::Tensor& inputs, bool) {
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
      const at::Tensor weight = block->dense(linear.role).weight().cpu();
      const at::Tensor weight_t = weight.t().contiguous();
      scores.push_back(ImportanceScore(weight_t, Importance::kWanda)(
          weight_t, norm_sq[static_cast<size_t>(linear.tap)], {}));
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

/// What the allocation by patterns says.
Plan plan_by_pattern(const PlanRequest& request, HiddenStream& stream) {
  const ModelSpec& spec = request.decoder.spec();
  const auto& [vary, scheme] = std::get<PatternAllocation>(request.recipe.model.allocation);
  Plan plan = uniform_plan(spec, scheme);
  if (vary == PatternAllocation::Vary::kNot) return plan;
  const std::vector<NmPattern> patterns =
      vary == PatternAllocation::Vary::kByNorm
          ? allocate_by_norm(scheme.nm, block_norms(request.checkpoint, spec))
          : allocate_by_outliers(scheme.nm, block_outlier_shares(request.decoder, stream, request.group));
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) plan.at(linear.name).scheme.nm = patterns[i];
  return plan;
}

}  // namespace

Plan plan_model(const PlanRequest& request, HiddenStream& stream) {
  const ModelPolicy& policy = request.recipe.model;
  Plan plan = std::holds_alternative<BudgetAllocation>(policy.allocation) ? plan_by_budget(request)
                                                                          : plan_by_pattern(request, stream);
  apply_rules(plan, policy);
  return plan;
}

void apply_rules(Plan& plan, const ModelPolicy& policy) {
  std::erase_if(plan, [&](const auto& entry) { return policy.keeps(entry.first); });
  for (auto& [name, own] : plan)
    if (const LinearRule* rule = policy.rule_for(name)) own.scheme = *rule->code;
}

int64_t quantized_weights(const ModelSpec& spec, const ModelPolicy& policy, int64_t blocks) {
  Plan plan = uniform_plan(spec, {});
  apply_rules(plan, policy);
  return planned_weights(plan, spec, blocks);
}

void check_rules(const ModelSpec& spec, const ModelPolicy& policy, int64_t blocks) {
  const Plan all = uniform_plan(spec, {});
  for (const LinearRule& rule : policy.rules)
    if (std::ranges::none_of(all, [&](const auto& entry) { return rule.names(entry.first); }))
      fail(ErrorCode::kUsage, "no linear is called '{}'; this model's first one is {}", rule.linears,
           spec.linears(0).front().name);
  if (quantized_weights(spec, policy, blocks) == 0)
    fail(ErrorCode::kUsage, "all linears keep their weights; nothing is left to quantize");
}

}  // namespace stbllm
