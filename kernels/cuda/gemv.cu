// The GEMV kernel for 1..16 tokens.

#include "gemv.cuh"
#include "launch.h"

namespace stbllm::cuda {
namespace {

template <bool kSparse, int kPlanes, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 4)
    gemv_kernel(WeightView weights, InputView input, OutputView output) {
  gemv<kSparse, kPlanes, Shape>(weights, input, output);
}

template <bool kSparse, int kPlanes, typename Shape>
cudaError_t launch_shape(const WeightView& weights, const InputView& input, const OutputView& output,
                         cudaStream_t stream) {
  const auto kernel = gemv_kernel<kSparse, kPlanes, Shape>;
  const size_t shared = Shape::shared_bytes(weights.record_words, input.tokens);
  if (shared > size_t{48} << 10) {  // more than every kernel may have
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  const int blocks = (weights.row_tiles + Shape::kRowTiles - 1) / Shape::kRowTiles;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, shared, stream>>>(weights, input, output);
  return cudaGetLastError();
}

template <bool kSparse, int kPlanes>
cudaError_t launch_format(const WeightView& weights, const InputView& input, const OutputView& output,
                          cudaStream_t stream) {
  if (input.tokens <= FewTokens::kMaxTokens)
    return launch_shape<kSparse, kPlanes, FewTokens>(weights, input, output, stream);
  return launch_shape<kSparse, kPlanes, SomeTokens>(weights, input, output, stream);
}

}  // namespace

cudaError_t launch_gemv(const WeightView& weights, const InputView& input, const OutputView& output,
                        cudaStream_t stream) {
  static_assert(SomeTokens::kMaxTokens == kMaxGemvTokens);
  const int planes = weights.format.level_planes;
  if (weights.format.sparse) {
    if (planes == 0) return launch_format<true, 0>(weights, input, output, stream);
    if (planes == 1) return launch_format<true, 1>(weights, input, output, stream);
    return launch_format<true, 2>(weights, input, output, stream);
  }
  if (planes == 0) return launch_format<false, 0>(weights, input, output, stream);
  if (planes == 1) return launch_format<false, 1>(weights, input, output, stream);
  return launch_format<false, 2>(weights, input, output, stream);
}

}  // namespace stbllm::cuda
