#pragma once
// Launcher of one half of the GEMM instantiations; see gemm_sparse.cu and gemm_dense.cu.

#include "gemm.cuh"
#include "launch.h"

namespace stbllm::cuda {

template <bool kSparse, int kPlanes, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 2)
    gemm_kernel(WeightView weights, const uint16_t* staged, const float* token_scales, OutputView output) {
  gemm<kSparse, kPlanes, Shape>(weights, staged, token_scales, output);
}

template <bool kSparse, int kPlanes, typename Shape>
cudaError_t launch_gemm_shape(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                              const OutputView& output, cudaStream_t stream) {
  const auto kernel = gemm_kernel<kSparse, kPlanes, Shape>;
  const size_t shared = Shape::shared_bytes(weights.record_words);
  if (shared > size_t{48} << 10) {  // more than every kernel may have
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const auto blocks = [](int count, int size) { return static_cast<unsigned>((count + size - 1) / size); };
  const dim3 grid(blocks(weights.row_tiles, Shape::kBlockTiles), blocks(output.tokens, Shape::kBlockTokens));
  kernel<<<grid, Shape::kThreads, shared, stream>>>(weights, staged, token_scales, output);
  return cudaGetLastError();
}

template <bool kSparse, int kPlanes>
cudaError_t launch_gemm_format(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                               const OutputView& output, cudaStream_t stream) {
  // One token block of the large shape would leave half of its tokens unused.
  if (output.tokens <= SmallGemm::kBlockTokens)
    return launch_gemm_shape<kSparse, kPlanes, SmallGemm>(weights, staged, token_scales, output, stream);
  return launch_gemm_shape<kSparse, kPlanes, LargeGemm>(weights, staged, token_scales, output, stream);
}

template <bool kSparse>
cudaError_t launch_gemm_half(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                             const OutputView& output, cudaStream_t stream) {
  switch (weights.format.level_planes) {
    case 0:
      return launch_gemm_format<kSparse, 0>(weights, staged, token_scales, output, stream);
    case 1:
      return launch_gemm_format<kSparse, 1>(weights, staged, token_scales, output, stream);
    default:
      return launch_gemm_format<kSparse, 2>(weights, staged, token_scales, output, stream);
  }
}

}  // namespace stbllm::cuda
