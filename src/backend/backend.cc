#include "stbllm/backend/backend.h"

#include <cstdlib>

#include "stbllm/backend/builtin.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

CpuIsa best_cpu_isa() {
  CpuIsa best = CpuIsa::kGeneric;
  for (const CpuIsa isa : kCpuIsas)
    if (missing_cpu_feature(isa).empty()) best = isa;
  return best;
}

// Why the CUDA backend cannot be used; empty when it can.
std::string no_cuda_reason() {
#ifdef STBLLM_HAS_CUDA
  return cuda_fault();
#else
  return "this program was built without CUDA";
#endif
}

// A backend and the sentence that justifies it.
struct AutoChoice {
  std::string name;
  std::string reason;
};

AutoChoice choose_automatically() {
  if (const std::string forced = backend_of_environment(); !forced.empty())
    return {forced, fmt::format("{} because the environment variable STBLLM_BACKEND says so", forced)};
  const std::string reason = no_cuda_reason();
  if (reason.empty()) return {"cuda", "cuda because a CUDA device is present"};
  const auto name = std::string(cpu_backend(best_cpu_isa()).name());
  return {name, fmt::format("{}, the widest instruction set of this CPU ({})", name, reason)};
}

}  // namespace

std::string backend_of_environment() {
  const char* value = std::getenv("STBLLM_BACKEND");
  return value == nullptr || std::string_view(value) == "auto" ? "" : value;
}

const Backend& find_backend(std::string_view name) {
  std::string chosen(name);
  if (chosen == "auto") chosen = choose_automatically().name;
  if (chosen == "cpu") return cpu_backend(best_cpu_isa());
  if (chosen == "reference") return reference_backend();
  for (const CpuIsa isa : kCpuIsas) {
    if (chosen != cpu_backend(isa).name()) continue;
    if (const std::string_view missing = missing_cpu_feature(isa); !missing.empty())
      fail(ErrorCode::kUnsupported, "backend '{}' cannot run here: this CPU lacks {}; use 'auto'", chosen,
           missing);
    return cpu_backend(isa);
  }
  if (chosen == "cuda") {
    const std::string reason = no_cuda_reason();
    if (!reason.empty())
      fail(ErrorCode::kUnsupported, "backend 'cuda' cannot run here: {}; use 'cpu'", reason);
#ifdef STBLLM_HAS_CUDA
    return cuda_backend();
#endif
  }
  std::string names;
  for (const std::string_view available : available_backends()) names.append(", ").append(available);
  fail(ErrorCode::kUsage, "unknown backend '{}'; use one that this machine can run: auto, cpu{}", chosen,
       names);
}

std::string describe_auto_backend() { return choose_automatically().reason; }

std::vector<std::string_view> available_backends() {
  std::vector<std::string_view> names = {reference_backend().name()};
  for (const CpuIsa isa : kCpuIsas)
    if (missing_cpu_feature(isa).empty()) names.push_back(cpu_backend(isa).name());
#ifdef STBLLM_HAS_CUDA
  if (cuda_fault().empty()) names.push_back(cuda_backend().name());
#endif
  return names;
}

}  // namespace stbllm
