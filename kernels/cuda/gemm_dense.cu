// The GEMM on mma.sync m16n8k16, for all other layouts.

#include "gemm_launch.cuh"

namespace stbllm::cuda {

cudaError_t launch_dense_gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                              const OutputView& output, cudaStream_t stream) {
  return launch_gemm_half<false>(weights, staged, token_scales, output, stream);
}

}  // namespace stbllm::cuda
