#pragma once
// y (tokens, rows) = x (tokens, cols) W^T for many tokens.
//
// A block computes row tiles x tokens; K runs in chunks of 64 columns through a cp.async ring: activations in
// every chunk, the records of 256 columns with every fourth. Each warp decodes the A fragments of its own
// rows in registers (weights.cuh) and uses each for all of its tokens; activations come from shared memory by
// ldmatrix, their 16-byte pieces XOR-swizzled by token against bank conflicts.
//
// Per 16 rows x 32 columns a warp spends about 11 integer operations per lane on decoding one-level 2:4
// weights and kTokenTiles `mma.sp`; with 8 token tiles decoding hides behind the tensor cores. Shared memory
// delivers 64 tokens x 64 B per warp and 32 columns, shared by kRowTiles row tiles. Twin: the harness tests
// run this body against StructuredBinaryMatrix::at().

#include "activations.cuh"
#include "weights.cuh"

namespace stbllm::cuda {

/// How a block is divided.
template <int kRowWarpsV, int kTokenWarpsV, int kRowTilesV>
struct GemmShape {
  static constexpr int kRowWarps = kRowWarpsV, kTokenWarps = kTokenWarpsV;
  static constexpr int kRowTiles = kRowTilesV;  ///< per warp, 16 rows each
  static constexpr int kTokenTiles = 8;         ///< per warp, 8 tokens each
  static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  static constexpr int kBlockTiles = kRowWarps * kRowTiles;
  static constexpr int kBlockTokens = kTokenWarps * kTokenTiles * 8;
  static constexpr int kStages = 4;
  static constexpr int kRowBytes = 2 * kChunkColumns;  ///< of a token in a stage
  static constexpr int kStageBytes = kBlockTokens * kRowBytes;

  static size_t shared_bytes(int record_words) {
    return size_t{kStages} * kStageBytes + size_t{2} * kBlockTiles * record_words * 4;
  }
};
/// 128 x 128: each weight is decoded twice and each activation read twice per block.
using LargeGemm = GemmShape<2, 2, 4>;
/// 64 x 64: more blocks when there are few tokens.
using SmallGemm = GemmShape<4, 1, 1>;

/// Grid: x over row blocks (neighbours share activations in L2), y over token blocks.
template <bool kSparse, int kPlanes, typename Shape>
STBLLM_DEVICE void gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                        const OutputView& output) {
  constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles, kStages = Shape::kStages;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int first_tile = block_x() * Shape::kBlockTiles;
  const int first_token = block_y() * Shape::kBlockTokens;
  const int warp_tile = warp % Shape::kRowWarps * kRowTiles;
  const int warp_token = warp / Shape::kRowWarps * kTokenTiles * 8;
  const int coded_chunks = weights.column_tiles * (kTileColumns / kChunkColumns);
  const int width = staged_width(weights), chunks = width / kChunkColumns;
  std::byte* const stages = shared_memory();
  auto* const records = reinterpret_cast<uint32_t*>(stages + kStages * Shape::kStageBytes);
  const int record_words = weights.record_words, record_pieces = record_words / 4;

  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      // A thread copies the same piece of every kThreads / 8-th token, so that its swizzle is the same, too.
      static_assert(Shape::kThreads / 8 % 8 == 0);
      std::byte* const to = stages + chunk % kStages * Shape::kStageBytes + thread / 8 * Shape::kRowBytes +
                            (thread % 8 ^ thread / 8 % 8) * 16;
      const uint16_t* const from = staged + static_cast<int64_t>(first_token + thread / 8) * width +
                                   chunk * kChunkColumns + thread % 8 * 8;
#pragma unroll
      for (int token = 0; token < Shape::kBlockTokens; token += Shape::kThreads / 8) {
        const bool valid = first_token + thread / 8 + token < output.tokens;
        copy_async_16(to + token * Shape::kRowBytes,
                      valid ? from + static_cast<int64_t>(token) * width : staged, valid);
      }
    }
    if (chunk < coded_chunks && chunk % 4 == 0) {
      uint32_t* const to = records + chunk / 4 % 2 * Shape::kBlockTiles * record_words;
      for (int i = thread; i < Shape::kBlockTiles * record_pieces; i += Shape::kThreads) {
        const int tile = first_tile + i / record_pieces, piece = i % record_pieces;
        const int64_t row_tile = tile < weights.row_tiles ? tile : weights.row_tiles - 1;
        copy_async_16(
            to + i * 4,
            weights.records + (row_tile * weights.column_tiles + chunk / 4) * record_words + piece * 4, true);
      }
    }
    commit_copies();
  };
  const auto load_b = [&](uint32_t(&b)[kTokenTiles][4], int chunk, int step) {
    const std::byte* const stage = stages + chunk % kStages * Shape::kStageBytes;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = warp_token + 8 * n + lane % 8, piece = 4 * step + lane / 8;
      load_matrices(b[n], stage + token * Shape::kRowBytes + (piece ^ token % 8) * 16);
    }
  };

  float d[kRowTiles][kTokenTiles][4] = {};
  const auto multiply_coded = [&](int chunk) {
    const uint32_t* const tile_records =
        records + (chunk / 4 % 2 * Shape::kBlockTiles + warp_tile) * record_words;
    // Two steps share the decoding of metadata where that fits into 255 registers without spills; a dense
    // kernel has none to share, and needs the fewest when its steps are a loop.
    constexpr int kSteps = kSparse && kPlanes < 2 ? 2 : 1;
    [[maybe_unused]] constexpr int kUnroll =
        kSparse ? 2 : 1;  // of the pragma below, which host compilers skip
#pragma unroll kUnroll
    for (int first = 0; first < 2; first += kSteps) {
      uint32_t b[kSteps][kTokenTiles][4];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) load_b(b[s], chunk, first + s);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const TileChunk<kSparse, kPlanes> weight(tile_records + r * record_words, weights.levels, chunk % 4,
                                                 lane);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) weight.multiply(d[r], b[s], first + s);
      }
    }
  };
  const auto multiply_extra = [&](int chunk) {
    const int first_step = (chunk - coded_chunks) * (kChunkColumns / kExtraColumns);
#pragma unroll 1  // rare
    for (int step = 0; step < 4 && first_step + step < weights.extra_steps; ++step) {
      uint32_t b[kTokenTiles][4];
      load_b(b, chunk, step / 2);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int tile = first_tile + warp_tile + r;
        const int64_t row_tile = tile < weights.row_tiles ? tile : weights.row_tiles - 1;
        const Words4 a = reinterpret_cast<const Words4*>(
            weights.extra_values)[(row_tile * weights.extra_steps + first_step + step) * 32 + lane];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
          mma(d[r][n], a.word, step % 2 == 0 ? b[n][0] : b[n][2], step % 2 == 0 ? b[n][1] : b[n][3]);
      }
    }
  };

  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    wait_copies<kStages - 2>();
    sync_threads();  // this chunk has arrived for all, and all are done with the stage that is loaded next
    load(chunk + kStages - 1);
    if (chunk < coded_chunks)
      multiply_coded(chunk);
    else
      multiply_extra(chunk);
  }

#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const int row = (first_tile + warp_tile + r) * kTileRows + 2 * (lane / 4);
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = first_token + warp_token + 8 * n + 2 * (lane % 4) + i;
        if (token >= output.tokens || row >= weights.rows) continue;
        const float factor = token_scales[token] * weights.scale;
        store_neighbours(output, static_cast<int64_t>(token) * weights.rows + row, row + 1 < weights.rows,
                         d[r][n][i] * factor, d[r][n][2 + i] * factor);
      }
  }
}

}  // namespace stbllm::cuda
