// The GEMM on mma.sp m16n8k32, for layouts that keep at most two of every four columns.

#include "gemm_launch.cuh"

namespace stbllm::cuda {

cudaError_t launch_sparse_gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                               const OutputView& output, cudaStream_t stream) {
  return launch_gemm_half<true>(weights, staged, token_scales, output, stream);
}

}  // namespace stbllm::cuda
