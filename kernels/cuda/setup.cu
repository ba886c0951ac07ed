// The kernels around the products: repacking, staging of activations, the layout probe.

#include "activations.cuh"
#include "launch.h"
#include "probe.cuh"
#include "repack.cuh"

namespace stbllm::cuda {
namespace {

__global__ void __launch_bounds__(kRepackThreads)
    repack_tiles_kernel(PlaneView planes, WeightView weights, uint32_t* records) {
  repack_tiles(planes, weights, records);
}
__global__ void __launch_bounds__(kRepackThreads)
    repack_extra_kernel(PlaneView planes, WeightView weights, uint32_t* values) {
  repack_extra(planes, weights, values);
}
__global__ void __launch_bounds__(kStageThreads)
    stage_kernel(WeightView weights, InputView input, uint16_t* staged, float* token_scales) {
  stage_token(weights, input, staged, token_scales);
}
__global__ void __launch_bounds__(32) probe_kernel(int* mismatches, int* first) { probe(mismatches, first); }

unsigned repack_blocks(int64_t warps) {
  constexpr int kWarps = kRepackThreads / 32;
  return static_cast<unsigned>((warps + kWarps - 1) / kWarps);
}

}  // namespace

cudaError_t launch_repack(const PlaneView& planes, const WeightView& weights, uint32_t* records,
                          uint32_t* extra_values, cudaStream_t stream) {
  repack_tiles_kernel<<<repack_blocks(int64_t{weights.row_tiles} * weights.column_tiles), kRepackThreads, 0,
                        stream>>>(planes, weights, records);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || weights.extra_steps == 0) return error;
  repack_extra_kernel<<<repack_blocks(int64_t{weights.row_tiles} * weights.extra_steps), kRepackThreads, 0,
                        stream>>>(planes, weights, extra_values);
  return cudaGetLastError();
}

cudaError_t launch_stage(const WeightView& weights, const InputView& input, uint16_t* staged,
                         float* token_scales, cudaStream_t stream) {
  stage_kernel<<<static_cast<unsigned>(input.tokens), kStageThreads, kStageThreads / 32 * sizeof(uint32_t),
                 stream>>>(weights, input, staged, token_scales);
  return cudaGetLastError();
}

cudaError_t launch_gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                        const OutputView& output, cudaStream_t stream) {
  const auto launch = weights.format.sparse ? launch_sparse_gemm : launch_dense_gemm;
  return launch(weights, staged, token_scales, output, stream);
}

cudaError_t launch_probe(int* mismatches, int* first, cudaStream_t stream) {
  probe_kernel<<<1, 32, 0, stream>>>(mismatches, first);
  return cudaGetLastError();
}

}  // namespace stbllm::cuda
