#pragma once
// Kernel launches: they choose grid, shared memory and instantiation, and return the runtime's error. Host
// code that checks arguments and explains errors is in backend.cc.

#include <cuda_runtime_api.h>

#include "device_layout.h"

namespace stbllm::cuda {

/// Tokens up to which the GEMV kernel is used.
inline constexpr int kMaxGemvTokens = 16;

/// Fills `records` and `extra_values` of `weights` from the planes.
cudaError_t launch_repack(const PlaneView& planes, const WeightView& weights, uint32_t* records,
                          uint32_t* extra_values, cudaStream_t stream);

/// 1 .. kMaxGemvTokens tokens; several of them have been through launch_stage, for one nothing is staged.
cudaError_t launch_gemv(const WeightView& weights, const InputView& input, const uint16_t* staged,
                        const float* token_scales, const OutputView& output, cudaStream_t stream);

/// `staged` (tokens, staged_width(weights)) fp16 and `token_scales` (tokens) are scratch.
cudaError_t launch_stage(const WeightView& weights, const InputView& input, uint16_t* staged,
                         float* token_scales, cudaStream_t stream);
cudaError_t launch_gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                        const OutputView& output, cudaStream_t stream);
// The two halves of launch_gemm, compiled apart.
cudaError_t launch_sparse_gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                               const OutputView& output, cudaStream_t stream);
cudaError_t launch_dense_gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                              const OutputView& output, cudaStream_t stream);

/// Lets every launch of `kernel` have up to `bytes` of shared memory. The same `bytes` each time, so that
/// concurrent launches do not take it from each other.
template <typename Kernel>
cudaError_t allow_shared_memory(Kernel kernel, size_t bytes) {
  constexpr size_t kAlwaysAllowed = size_t{48} << 10;
  if (bytes <= kAlwaysAllowed) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

/// Multiplies one tile of every element and every metadata value by `mma` and `mma.sp` and compares each
/// result with fragments.h. *mismatches receives the number of wrong results and *first the index of one of
/// them (probe.cuh).
cudaError_t launch_probe(int* mismatches, int* first, cudaStream_t stream);

}  // namespace stbllm::cuda
