#include "stbllm/base/profile.h"

#include <algorithm>

#include "stbllm/base/clock.h"

namespace stbllm {
namespace {

struct Profile {
  std::vector<Stage> stages;
  std::vector<size_t> open;  // indices into `stages`, the outermost first
};

Profile& profile() {
  thread_local Profile instance;
  return instance;
}

}  // namespace

StageTimer::StageTimer(std::string_view name, double flops) : started_(seconds_now()), flops_(flops) {
  auto& [stages, open] = profile();
  const std::string path =
      open.empty() ? std::string(name) : stages[open.back()].name + "/" + std::string(name);
  const auto found =
      std::find_if(stages.begin(), stages.end(), [&](const Stage& stage) { return stage.name == path; });
  open.push_back(found - stages.begin());
  if (found == stages.end()) stages.push_back({path});
}

StageTimer::~StageTimer() {
  auto& [stages, open] = profile();
  Stage& stage = stages[open.back()];
  stage.seconds += seconds_now() - started_;
  ++stage.calls;
  for (const size_t index : open) stages[index].flops += flops_;
  open.pop_back();
}

std::vector<Stage> profiled_stages() {
  // A stage first met inside a later call of an outer one stands behind others; put it back under its own.
  std::vector<Stage> ordered;
  for (const Stage& stage : profile().stages) {
    const auto belongs = [&](const Stage& other) {
      const std::string outer = stage.name.substr(0, stage.name.rfind('/'));
      return other.name == outer || other.name.starts_with(outer + "/");
    };
    const bool nested = stage.name.find('/') != std::string::npos;
    const auto last = nested ? std::find_if(ordered.rbegin(), ordered.rend(), belongs).base() : ordered.end();
    ordered.insert(last, stage);
  }
  return ordered;
}

void reset_profile() { profile() = {}; }

}  // namespace stbllm
