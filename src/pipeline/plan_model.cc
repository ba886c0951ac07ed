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

/// What `budget` chooses from: 0.5, 0.75, 0.875, 1.125, 1.375, 2 and 2.5 bits of codes per weight. They lie
/// on the lower hull of bits and squared error on normal weights; 2:4 with three levels, say, errs over 1.3
/// times as much as 3:4 with two.
constexpr std::array<Code, 7> kBudgetCodes = {
    {{{1, 8}, 1}, {{1, 4}, 1}, {{2, 8}, 1}, {{3, 8}, 1}, {{5, 8}, 1}, {{3, 4}, 2}, {{3, 4}, 3}}};
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
std::vector<double> block_outlier_shares(const Decoder& decoder, at::Tensor& hidden,
                                         const ProcessGroup& group) {
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

/// The windows that the plan looks at, of training and then of those held out, and how many the latter are.
std::pair<Windows, int64_t> plan_windows(const Calibration& calibration) {
  const auto& all = calibration.windows;
  const auto seqlen = static_cast<int64_t>(all[0].size()),
             training = std::ssize(all) - calibration.distill_only - calibration.holdout;
  const int64_t holdout = std::min(calibration.holdout, ceil_div(kPlanTokens / 4, seqlen));
  const auto first = all.begin() + calibration.distill_only, first_held_out = all.end() - calibration.holdout;
  Windows windows(first, first + std::min(training, ceil_div(kPlanTokens, seqlen)));
  windows.insert(windows.end(), first_held_out, first_held_out + holdout);
  return {windows, holdout};
}

Recipe with_code(Recipe recipe, const Code& code) {
  recipe.nm = code.nm;
  recipe.levels = code.levels;
  return recipe;
}

/// What a linear is offered, and how many of its columns are outliers.
struct Offers {
  std::vector<Offer> codes;
  int outliers = 0;
};

void broadcast(Offers& offers, const ProcessGroup& group, int root) {
  nlohmann::json facts = {{"outliers", offers.outliers}, {"codes", nlohmann::json::array()}};
  for (const Offer& offer : offers.codes) facts["codes"].push_back({offer.bytes, offer.error});
  group.broadcast(facts, root);
  offers = {{}, facts.at("outliers")};
  for (const auto& [bytes, error] : facts.at("codes").get<std::vector<std::pair<int64_t, double>>>())
    offers.codes.push_back({bytes, error});
}

int64_t budget_bytes(const ModelSpec& spec, const Recipe& recipe, int64_t blocks) {
  return static_cast<int64_t>(recipe.target_bpw / 8 *
                              static_cast<double>(spec.linear_weights() / spec.layers * blocks));
}

Plan plan_by_budget(const Decoder& decoder, const Calibration& calibration, int64_t blocks,
                    const Recipe& recipe, const ProcessGroup& group) {
  const ModelSpec& spec = decoder.spec();
  const auto [windows, holdout] = plan_windows(calibration);
  at::Tensor hidden = decoder.embed(ids_of(windows)).to(at::kFloat);
  const int64_t judged = holdout > 0 ? holdout : hidden.size(0);  // the last so many windows judge
  Plan plan = uniform_plan(spec, recipe);
  std::vector<std::string> names;
  std::vector<std::vector<Offer>> offers;
  log::Progress progress("plan: block", blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    const auto block = decoder.block(i);
    const at::Tensor inputs = hidden.narrow(0, hidden.size(0) - judged, judged).clone();
    TapStats taps(block->linears(), recipe.token_weights);
    advance(
        *block, spec, hidden, [&](Tap tap, const at::Tensor& x, bool held) { taps.add(tap, x, held); },
        holdout);
    const at::Tensor outputs = hidden.narrow(0, hidden.size(0) - judged, judged);
    const std::array<InputStats, kTapCount> stats = taps.finish();

    const std::vector<LinearSpec> linears = block->linears();
    const std::vector<int> owners = divide(linears, group.size());
    std::vector<Offers> own(linears.size());
    for (size_t l = 0; l < linears.size(); ++l) {
      if (owners[l] != group.rank()) continue;
      check_interrupt();
      const LinearSpec& linear = linears[l];
      const auto& dense = block->dense(linear.role);
      const at::Tensor weight = dense.weight(), bias = dense.bias();
      const at::ScalarType products = dense.product_dtype();
      double unit = 0;
      for (size_t c = 0; c < kBudgetCodes.size(); ++c) {
        Recipe quick = with_code(recipe, kBudgetCodes[c]);
        quick.refit = quick.descend = 0;
        if (quick.shrink < 0) quick.shrink = kPlanShrink;
        LinearReport report;
        const BinarizedWeight binarized =
            quantize_linear(weight, stats[static_cast<size_t>(linear.tap)], quick, &report);
        check_outputs(report, linear.name);
        const double error = report.holdout_error < 0 ? report.output_error : report.holdout_error;
        own[l].codes.push_back({pack_weight(binarized, linear.name).bytes(), error});
        if (c != kMeasuredCode) continue;
        own[l].outliers = binarized.has_outliers() ? static_cast<int>(binarized.outlier_columns.numel()) : 0;
        block->set_linear(linear.role, std::make_unique<DenseLinear>(binarized.to_dense().to(weight.device()),
                                                                     bias, products));
        unit =
            compare_hidden(run_block(*block, spec, inputs), outputs).relative_error / std::max(error, 1e-12);
        block->set_linear(linear.role, std::make_unique<DenseLinear>(weight, bias, products));
      }
      for (Offer& offer : own[l].codes) offer.error *= unit;
    }
    for (size_t l = 0; l < linears.size(); ++l) {
      broadcast(own[l], group, owners[l]);
      // Behind quantized blocks more columns might pass for outliers, and exceed the budget.
      plan.at(linears[l].name).max_outliers = own[l].outliers;
      names.push_back(linears[l].name);
      offers.push_back(std::move(own[l].codes));
    }
    progress.update(i + 1);
  }
  const std::vector<size_t> choice = allocate_by_budget(offers, budget_bytes(spec, recipe, blocks));
  for (size_t i = 0; i < names.size(); ++i)
    plan.at(names[i]) = with_code(plan.at(names[i]), kBudgetCodes[choice[i]]);
  return plan;
}

}  // namespace

Plan plan_model(const Checkpoint& checkpoint, const Decoder& decoder, const Calibration& calibration,
                at::Tensor& hidden, int64_t blocks, const Recipe& recipe, const ProcessGroup& group) {
  const ModelSpec& spec = decoder.spec();
  if (recipe.allocation == Allocation::kBudget)
    return plan_by_budget(decoder, calibration, blocks, recipe, group);
  Plan plan = uniform_plan(spec, recipe);
  if (recipe.allocation == Allocation::kUniform) return plan;
  const std::vector<NmPattern> patterns =
      recipe.allocation == Allocation::kNorm
          ? allocate_by_norm(recipe.nm, block_norms(checkpoint, spec))
          : allocate_by_outliers(recipe.nm, block_outlier_shares(decoder, hidden, group));
  for (int64_t i = 0; i < spec.layers; ++i)
    for (const LinearSpec& linear : spec.linears(i)) plan.at(linear.name).nm = patterns[i];
  return plan;
}

void check_budget(const ModelSpec& spec, const Recipe& recipe, int64_t blocks) {
  if (recipe.allocation != Allocation::kBudget) return;
  int64_t least = 0;
  for (const LinearSpec& linear : spec.linears(0)) {
    const auto& [nm, levels] = kBudgetCodes[0];
    least += layout_bytes({linear.rows, linear.cols, nm, levels, recipe.column_block, recipe.scale_bits});
  }
  check_affordable(blocks * least, budget_bytes(spec, recipe, blocks));
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

nlohmann::json to_json(const Plan& plan) {
  nlohmann::json json = nlohmann::json::object();
  for (const auto& [name, recipe] : plan) json[name] = recipe.to_json();
  return json;
}

Plan plan_from_json(const nlohmann::json& json) {
  Plan plan;
  for (const auto& [name, recipe] : json.items()) plan.emplace(name, Recipe::from_json(recipe));
  return plan;
}

std::string describe(const Plan& plan, const ModelSpec& spec, int64_t blocks) {
  std::vector<Code> codes;
  for (int64_t i = 0; i < blocks; ++i)
    for (const LinearSpec& linear : spec.linears(i))
      codes.push_back({plan.at(linear.name).nm, plan.at(linear.name).levels});
  return describe(codes);
}

}  // namespace stbllm
