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

template <typename Shape>
dim3 gemm_grid(const WeightView& weights, const OutputView& output) {
  const auto blocks = [](int count, int size) { return static_cast<unsigned>((count + size - 1) / size); };
  return {blocks(weights.row_tiles, Shape::kBlockTiles), blocks(output.tokens, Shape::kBlockTokens)};
}

template <bool kSparse, int kPlanes, typename Shape>
cudaError_t launch_gemm_shape(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                              const OutputView& output, cudaStream_t stream) {
  const auto kernel = gemm_kernel<kSparse, kPlanes, Shape>;
  const size_t most = Shape::shared_bytes(most_record_words(kSparse, kPlanes));
  if (const cudaError_t error = allow_shared_memory(kernel, most); error != cudaSuccess) return error;
  const dim3 grid = gemm_grid<Shape>(weights, output);
  kernel<<<grid, Shape::kThreads, Shape::shared_bytes(weights.record_words), stream>>>(weights, staged,
                                                                                       token_scales, output);
  return cudaGetLastError();
}

template <bool kSparse, int kPlanes>
cudaError_t launch_gemm_format(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                               const OutputView& output, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  // The large shape would leave half of its tokens unused, or a part of the device without work.
  const dim3 large = gemm_grid<LargeGemm>(weights, output);
  if (output.tokens <= SmallGemm::kBlockTokens || large.x * large.y < static_cast<unsigned>(multiprocessors))
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
