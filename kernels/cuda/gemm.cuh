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
// delivers 64 tokens x 64 B per warp and 32 columns, shared by kRowTiles row tiles. The harness tests run
// this body against StructuredBinaryMatrix::at().

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

/// What one warp of a block does: kRowTiles row tiles times kTokenTiles token tiles.
template <bool kSparse, int kPlanes, typename Shape>
class GemmWarp {
 public:
  static constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles;
  static constexpr int kStages = Shape::kStages;
  using Sums = float[kRowTiles][kTokenTiles][4];  // D fragments
  using Operand = uint32_t[kTokenTiles][4];       // B fragments of 32 columns

  STBLLM_DEVICE GemmWarp(const WeightView& weights, const uint16_t* staged, int tokens)
      : weights_(weights),
        staged_(staged),
        tokens_(tokens),
        lane_(thread_index() % 32),
        first_tile_(block_x() * Shape::kBlockTiles),
        first_token_(block_y() * Shape::kBlockTokens),
        warp_tile_(thread_index() / 32 % Shape::kRowWarps * kRowTiles),
        warp_token_(thread_index() / 32 / Shape::kRowWarps * kTokenTiles * 8),
        record_chunks_(weights.column_tiles * (kTileColumns / kChunkColumns)),
        width_(staged_width(weights)),
        stages_(shared_memory()),
        records_(reinterpret_cast<uint32_t*>(stages_ + kStages * Shape::kStageBytes)) {}

  /// Adds the products with all columns to `d`.
  STBLLM_DEVICE void multiply(Sums& d) const {
    const int chunks = width_ / kChunkColumns;
    for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_copies<kStages - 2>();
      sync_threads();  // this chunk has arrived for all, and all are done with the stage that is loaded next
      load(chunk + kStages - 1);
      if (chunk < record_chunks_)
        multiply_records(d, chunk);
      else
        multiply_extra(d, chunk);
    }
  }

  STBLLM_DEVICE void store(const Sums& d, const float* token_scales, const OutputView& output) const {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int row = (first_tile_ + warp_tile_ + r) * kTileRows + 2 * (lane_ / 4);
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = first_token_ + warp_token_ + 8 * n + 2 * (lane_ % 4) + i;
          if (token >= tokens_ || row >= weights_.rows) continue;
          const float factor = token_scales[token] * weights_.scale;
          store_neighbours(output, static_cast<int64_t>(token) * weights_.rows + row, row + 1 < weights_.rows,
                           d[r][n][i] * factor, d[r][n][2 + i] * factor);
        }
    }
  }

 private:
  /// `tile`, or the last one for rows beyond the matrix.
  STBLLM_DEVICE int64_t row_tile(int tile) const {
    return tile < weights_.row_tiles ? tile : weights_.row_tiles - 1;
  }

  /// Starts the copies of a chunk: its activations, and with every fourth chunk the records of 256 columns.
  STBLLM_DEVICE void load(int chunk) const {
    if (chunk * kChunkColumns < width_) load_activations(chunk);
    if (chunk < record_chunks_ && chunk % 4 == 0) load_records(chunk / 4);
    commit_copies();
  }

  /// A thread copies the same piece of every kThreads / 8-th token, so that its swizzle is the same, too.
  STBLLM_DEVICE void load_activations(int chunk) const {
    static_assert(Shape::kThreads / 8 % 8 == 0);
    const int piece = thread_index() % 8, thread_token = thread_index() / 8;
    std::byte* const to = stages_ + chunk % kStages * Shape::kStageBytes + thread_token * Shape::kRowBytes +
                          (piece ^ thread_token % 8) * 16;
    const uint16_t* const from = staged_ + static_cast<int64_t>(first_token_ + thread_token) * width_ +
                                 chunk * kChunkColumns + piece * 8;
#pragma unroll
    for (int token = 0; token < Shape::kBlockTokens; token += Shape::kThreads / 8) {
      const bool valid = first_token_ + thread_token + token < tokens_;
      copy_async_16(to + token * Shape::kRowBytes,
                    valid ? from + static_cast<int64_t>(token) * width_ : staged_, valid);
    }
  }

  STBLLM_DEVICE void load_records(int column_tile) const {
    const int record_words = weights_.record_words, record_pieces = record_words / 4;
    uint32_t* const to = records_ + column_tile % 2 * Shape::kBlockTiles * record_words;
    for (int i = thread_index(); i < Shape::kBlockTiles * record_pieces; i += Shape::kThreads) {
      const int64_t tile = row_tile(first_tile_ + i / record_pieces);
      copy_async_16(to + i * 4,
                    weights_.records + (tile * weights_.column_tiles + column_tile) * record_words +
                        i % record_pieces * 4,
                    true);
    }
  }

  STBLLM_DEVICE void load_b(Operand& b, int chunk, int step) const {
    const std::byte* const stage = stages_ + chunk % kStages * Shape::kStageBytes;
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = warp_token_ + 8 * n + lane_ % 8, piece = 4 * step + lane_ / 8;
      load_matrices(b[n], stage + token * Shape::kRowBytes + (piece ^ token % 8) * 16);
    }
  }

  STBLLM_DEVICE void multiply_records(Sums& d, int chunk) const {
    const int record_words = weights_.record_words;
    const uint32_t* const tile_records =
        records_ + (chunk / 4 % 2 * Shape::kBlockTiles + warp_tile_) * record_words;
    // Two steps share the decoding of metadata where that fits into 255 registers without spills; a dense
    // kernel has none to share, and needs the fewest when its steps are a loop.
    constexpr int kSteps = kSparse && kPlanes < 2 ? 2 : 1;
    [[maybe_unused]] constexpr int kUnroll =
        kSparse ? 2 : 1;  // of the pragma below, which host compilers skip
#pragma unroll kUnroll
    for (int first = 0; first < 2; first += kSteps) {
      Operand b[kSteps];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) load_b(b[s], chunk, first + s);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const TileChunk<kSparse, kPlanes> weight(tile_records + r * record_words, weights_.levels, chunk % 4,
                                                 lane_);
#pragma unroll
        for (int s = 0; s < kSteps; ++s) weight.multiply(d[r], b[s], first + s);
      }
    }
  }

  STBLLM_DEVICE void multiply_extra(Sums& d, int chunk) const {
    const int first_step = (chunk - record_chunks_) * (kChunkColumns / kExtraColumns);
#pragma unroll 1  // rare
    for (int step = 0; step < 4 && first_step + step < weights_.extra_steps; ++step) {
      Operand b;
      load_b(b, chunk, step / 2);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const int64_t tile = row_tile(first_tile_ + warp_tile_ + r);
        const Words4 a = reinterpret_cast<const Words4*>(
            weights_.extra_values)[(tile * weights_.extra_steps + first_step + step) * 32 + lane_];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
          mma(d[r][n], a.word, step % 2 == 0 ? b[n][0] : b[n][2], step % 2 == 0 ? b[n][1] : b[n][3]);
      }
    }
  }

  const WeightView& weights_;
  const uint16_t* staged_;
  int tokens_, lane_, first_tile_, first_token_;
  int warp_tile_, warp_token_;  // of the block
  int record_chunks_;           // those that tiles hold; the others are of extra columns
  int width_;                   // of a token in `staged`
  std::byte* stages_;           // (kStages, kBlockTokens, kRowBytes)
  uint32_t* records_;           // (2, kBlockTiles, record_words)
};

/// The grid runs over row blocks in x (neighbours share activations in L2) and token blocks in y.
template <bool kSparse, int kPlanes, typename Shape>
STBLLM_DEVICE void gemm(const WeightView& weights, const uint16_t* staged, const float* token_scales,
                        const OutputView& output) {
  const GemmWarp<kSparse, kPlanes, Shape> warp(weights, staged, output.tokens);
  float d[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
  warp.multiply(d);
  warp.store(d, token_scales, output);
}

}  // namespace stbllm::cuda
