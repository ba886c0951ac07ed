// The GEMV kernel for 1..16 tokens.

#include "gemv.cuh"
#include "launch.h"

namespace stbllm::cuda {
namespace {

template <bool kSparse, int kPlanes, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 4)
    gemv_kernel(WeightView weights, InputView input, const uint16_t* staged, const float* token_scales,
                OutputView output) {
  gemv<kSparse, kPlanes, Shape>(weights, input, staged, token_scales, output);
}

template <bool kSparse, int kPlanes, typename Shape>
cudaError_t launch_shape(const WeightView& weights, const InputView& input, const uint16_t* staged,
                         const float* token_scales, const OutputView& output, cudaStream_t stream) {
  const auto kernel = gemv_kernel<kSparse, kPlanes, Shape>;
  const size_t most = Shape::shared_bytes(most_record_words(kSparse, kPlanes), Shape::kMaxTokens);
  if (const cudaError_t error = allow_shared_memory(kernel, most); error != cudaSuccess) return error;
  const size_t shared = Shape::shared_bytes(weights.record_words, input.tokens);
  const int blocks = (weights.row_tiles + Shape::kRowTiles - 1) / Shape::kRowTiles;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, shared, stream>>>(weights, input, staged,
                                                                             token_scales, output);
  return cudaGetLastError();
}

template <bool kSparse, int kPlanes>
cudaError_t launch_format(const WeightView& weights, const InputView& input, const uint16_t* staged,
                          const float* token_scales, const OutputView& output, cudaStream_t stream) {
  if (input.tokens <= FewTokens::kMaxTokens)
    return launch_shape<kSparse, kPlanes, FewTokens>(weights, input, staged, token_scales, output, stream);
  return launch_shape<kSparse, kPlanes, SomeTokens>(weights, input, staged, token_scales, output, stream);
}

}  // namespace

cudaError_t launch_gemv(const WeightView& weights, const InputView& input, const uint16_t* staged,
                        const float* token_scales, const OutputView& output, cudaStream_t stream) {
  static_assert(SomeTokens::kMaxTokens == kMaxGemvTokens);
  const int planes = weights.format.level_planes;
  if (weights.format.sparse) {
    if (planes == 0) return launch_format<true, 0>(weights, input, staged, token_scales, output, stream);
    if (planes == 1) return launch_format<true, 1>(weights, input, staged, token_scales, output, stream);
    return launch_format<true, 2>(weights, input, staged, token_scales, output, stream);
  }
  if (planes == 0) return launch_format<false, 0>(weights, input, staged, token_scales, output, stream);
  if (planes == 1) return launch_format<false, 1>(weights, input, staged, token_scales, output, stream);
  return launch_format<false, 2>(weights, input, staged, token_scales, output, stream);
}

}  // namespace stbllm::cuda
