#pragma once
// The backends that are compiled into this program. Callers ask find_backend() instead.

#include <string>
#include <string_view>

#include "stbllm/backend/backend.h"

namespace stbllm {

/// Double-precision sums over StructuredBinaryMatrix::at(): the meaning of every other backend.
const Backend& reference_backend();

/// The instruction sets that there are kernels for, slowest first.
#if defined(__x86_64__)
enum class CpuIsa { kGeneric, kAvx2, kAvxVnni, kAvx512, kAmx };
inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::kGeneric, CpuIsa::kAvx2, CpuIsa::kAvxVnni, CpuIsa::kAvx512,
                                      CpuIsa::kAmx};
#elif defined(__aarch64__)
enum class CpuIsa { kGeneric, kNeon };
inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::kGeneric, CpuIsa::kNeon};
#else
enum class CpuIsa { kGeneric };
inline constexpr CpuIsa kCpuIsas[] = {CpuIsa::kGeneric};
#endif

/// The backend compiled for `isa`, whether this machine can run it or not.
const Backend& cpu_backend(CpuIsa isa);
/// The first instruction set extension of `isa` that this machine lacks; empty when it can run `isa`.
std::string_view missing_cpu_feature(CpuIsa isa);

#ifdef STBLLM_HAS_CUDA
const Backend& cuda_backend();
/// Why no CUDA device can be used; empty when one can.
std::string cuda_fault();
#endif

}  // namespace stbllm
