// The second stage. It reads the checkpoint and the calibration windows and leaves the plan. The work
// directory keeps a plan by budget, which takes a while to make.

#include "stages.h"
#include "stbllm/base/log.h"
#include "stbllm/base/profile.h"
#include "stbllm/plan/plan_model.h"

namespace stbllm {

void make_plan(Run& run) {
  const StageTimer timer("plan");
  const auto& [checkpoint, calibration, recipe, options, group] = run.request;
  nlohmann::json plan = options.plan;
  if (plan.is_null() && run.work) plan = run.work->load_plan();
  if (group.all_reduce(plan.is_null() ? 0.0 : 1.0) == 0) {  // process 0 knows
    plan = to_json(plan_model({.checkpoint = checkpoint,
                               .decoder = run.decoder,
                               .calibration = calibration,
                               .recipe = recipe,
                               .blocks = run.blocks(),
                               .group = group},
                              *run.quantized),
                   run.spec());
    if (run.work && std::holds_alternative<BudgetAllocation>(recipe.model.allocation))
      run.work->save_plan(plan);
    const auto* pattern = std::get_if<PatternAllocation>(&recipe.model.allocation);
    if (pattern != nullptr && pattern->vary == PatternAllocation::Vary::kByOutliers)
      run.quantized->embed(run.decoder);
  }
  group.broadcast(plan, 0);
  run.plan = plan_from_json(plan, run.spec());
  log::info("plan: {} ({})", describe(run.plan, run.spec(), run.blocks()),
            options.plan.is_null() ? recipe.to_json()["model"]["allocation"].get<std::string>() : "as given");
}

}  // namespace stbllm
