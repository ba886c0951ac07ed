#pragma once
// y (tokens, rows) = x (tokens, cols) W^T for 1..16 tokens: bound by the bytes of W.
//
// Every warp streams records of its own through a private cp.async ring (no barrier between warps) and
// multiplies them by mma with the tokens as the 8 columns of B: unused columns cost nothing that is scarce.
// One-level 2:4 weights cost about 0.7 integer operations per lane and weight, so 132 SMs at 1.7 GHz decode
// 20e12 weights/s, which at 1.375 bits is 3.5 TB/s: the bound of an H100's memory, just reached.
//
// A block owns kRowTiles row tiles; its warps divide K and add up in a fixed order at the end. Activations
// go to shared memory in the order of B fragments. Those of one token are converted on the way, each warp and
// tile with a power-of-two scale of its own; those of several tokens have been converted before, once instead
// of in every block (activations.cuh does both). The harness tests run this body against
// StructuredBinaryMatrix::at().

#include "activations.cuh"
#include "weights.cuh"

namespace stbllm::cuda {

template <int kTokenTilesV, int kRowTilesV, int kWarpsV, int kStagesV>
struct GemvShape {
  static constexpr int kTokenTiles = kTokenTilesV;  ///< 8 tokens each
  static constexpr int kRowTiles = kRowTilesV;      ///< 16 rows each
  static constexpr int kWarps = kWarpsV;
  static constexpr int kStages = kStagesV;
  static constexpr int kMaxTokens = 8 * kTokenTiles;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kSteps = kTileColumns / 32;
  static constexpr int kPartialWords = kRowTiles * kTokenTiles * 128;

  /// Of the activations of 32 columns; the four words of padding keep stores of eight lanes in different
  /// banks.
  STBLLM_HOST_DEVICE static constexpr int step_words(int tokens) { return 16 * tokens + 4; }
  STBLLM_HOST_DEVICE static constexpr int warp_words(int record_words, int tokens) {
    return kStages * kRowTiles * record_words + kSteps * step_words(tokens) + kMaxTokens;
  }
  static size_t shared_bytes(int record_words, int tokens) {
    const int words = warp_words(record_words, tokens);
    return size_t{4} * kWarps * (words > kPartialWords ? words : kPartialWords);
  }
};
/// Up to 8 tokens: many small blocks. Up to 16: two row tiles share twice the activations.
using FewTokens = GemvShape<1, 1, 8, 3>;
using SomeTokens = GemvShape<2, 2, 4, 2>;

/// What one warp of a block does: the products of its row tiles with every kWarps-th column tile.
template <bool kSparse, int kPlanes, typename Shape>
class GemvWarp {
 public:
  static constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles;
  static constexpr int kStages = Shape::kStages, kWarps = Shape::kWarps;
  using Sums = float[kRowTiles][kTokenTiles][4];  // D fragments
  using Operand = uint32_t[kTokenTiles][4];       // B fragments of 32 columns

  STBLLM_DEVICE GemvWarp(const WeightView& weights, const InputView& input, const uint16_t* staged,
                         const float* token_scales)
      : weights_(weights),
        input_(input),
        staged_(staged),
        token_scales_(token_scales),
        lane_(thread_index() % 32),
        warp_(thread_index() / 32),
        first_tile_(block_x() * kRowTiles),
        step_words_(Shape::step_words(input.tokens)),
        ring_(reinterpret_cast<uint32_t*>(shared_memory()) +
              warp_ * Shape::warp_words(weights.record_words, input.tokens)),
        activations_(ring_ + kStages * kRowTiles * weights.record_words),
        scales_(reinterpret_cast<float*>(activations_ + Shape::kSteps * step_words_)) {}

  /// Adds all of this warp's products to `total`.
  STBLLM_DEVICE void multiply(Sums& total) const {
    const int extra_tiles = (weights_.extra_steps * kExtraColumns + kTileColumns - 1) / kTileColumns;
    const int tiles = weights_.column_tiles + extra_tiles;
    for (int i = 0; i < kStages - 1; ++i) load_records(warp_ + i * kWarps, i);
    for (int tile = warp_, slot = 0; tile < tiles; tile += kWarps, slot = (slot + 1) % kStages) {
      load_records(tile + (kStages - 1) * kWarps, (slot + kStages - 1) % kStages);
      bring_activations(tile);
      wait_copies<kStages - 1>();
      sync_warp();

      Sums part = {};
      if (tile < weights_.column_tiles)
        multiply_records(part, ring_ + slot * kRowTiles * weights_.record_words);
      else
        multiply_extra(part, (tile - weights_.column_tiles) * (kTileColumns / kExtraColumns));
      add_scaled(total, part);
      sync_warp();  // the slot and the activations may be overwritten
    }
  }

  /// Writes the warp's sums to its place among the partial sums of the block.
  STBLLM_DEVICE void store_partial(const Sums& total) const {
    float* const partial = reinterpret_cast<float*>(shared_memory()) + warp_ * Shape::kPartialWords;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[((r * kTokenTiles + n) * 32 + lane_) * 4 + i] = total[r][n][i];
  }

 private:
  STBLLM_DEVICE int64_t row_tile(int r) const {
    return first_tile_ + r < weights_.row_tiles ? first_tile_ + r : weights_.row_tiles - 1;
  }

  /// Starts the copy of the records of a column tile into a slot of the ring.
  STBLLM_DEVICE void load_records(int tile, int slot) const {
    const int record_words = weights_.record_words;
    if (tile < weights_.column_tiles)
      for (int r = 0; r < kRowTiles; ++r) {
        const uint32_t* const from =
            weights_.records + (row_tile(r) * weights_.column_tiles + tile) * record_words;
        uint32_t* const to = ring_ + (slot * kRowTiles + r) * record_words;
        for (int i = lane_; i < record_words / 4; i += 32) copy_async_16(to + 4 * i, from + 4 * i, true);
      }
    commit_copies();
  }

  /// Brings the activations of a column tile to shared memory. Lane l brings columns 8 l .. 8 l + 7, which
  /// are step l / 4 and register l % 4 of the four members' B fragments.
  STBLLM_DEVICE void bring_activations(int tile) const {
    const int column = tile * kTileColumns + 8 * lane_;
    const auto put = [&](int token, const Words4& halves, float down) {
      uint32_t* const to = activations_ + lane_ / 4 * step_words_ + 16 * token + lane_ % 4;
#pragma unroll
      for (int member = 0; member < 4; ++member) to[4 * member] = halves.word[member];
      if (lane_ == 0) scales_[token] = down;
    };
    if (input_.tokens == 1) {
      float value[8];
      load_activations(weights_, input_, 0, column, value);
      const TokenScale scale(warp_max(largest_of(value)));
      put(0, pack_halves(value, scale.up), scale.down);
      return;
    }
    const int width = staged_width(weights_);
    for (int token = 0; token < input_.tokens; ++token) {
      Words4 halves = {};
      if (column < width)
        halves = *reinterpret_cast<const Words4*>(staged_ + static_cast<int64_t>(token) * width + column);
      put(token, halves, token_scales_[token]);
    }
  }

  STBLLM_DEVICE void load_b(Operand& b, int step) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = 8 * n + lane_ / 4;
      Words4 words = {};
      if (token < input_.tokens)
        words = *reinterpret_cast<const Words4*>(activations_ + step * step_words_ + 16 * token +
                                                 4 * (lane_ % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n][i] = words.word[i];
    }
  }

  STBLLM_DEVICE void multiply_records(Sums& part, const uint32_t* records) const {
    Operand b[2];
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      load_b(b[0], 2 * chunk);
      load_b(b[1], 2 * chunk + 1);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const TileChunk<kSparse, kPlanes> weight(records + r * weights_.record_words, weights_.levels, chunk,
                                                 lane_);
        weight.multiply(part[r], b[0], 0);
        weight.multiply(part[r], b[1], 1);
      }
    }
  }

  STBLLM_DEVICE void multiply_extra(Sums& part, int first_step) const {
#pragma unroll 1  // rare
    for (int step = 0; step < 16 && first_step + step < weights_.extra_steps; ++step) {
      Operand b;
      load_b(b, step / 2);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const Words4 a = reinterpret_cast<const Words4*>(
            weights_.extra_values)[(row_tile(r) * weights_.extra_steps + first_step + step) * 32 + lane_];
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n)
          mma(part[r][n], a.word, step % 2 == 0 ? b[n][0] : b[n][2], step % 2 == 0 ? b[n][1] : b[n][3]);
      }
    }
  }

  /// total += part, times what the activations were divided by.
  STBLLM_DEVICE void add_scaled(Sums& total, const Sums& part) const {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + d_element(lane_, i).col;
        const float scale = token < input_.tokens ? scales_[token] : 0.0f;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) total[r][n][i] += part[r][n][i] * scale;
      }
  }

  const WeightView& weights_;
  const InputView& input_;
  const uint16_t* staged_;
  const float* token_scales_;
  int lane_, warp_, first_tile_, step_words_;
  uint32_t* ring_;         // (kStages, kRowTiles, record_words)
  uint32_t* activations_;  // (kSteps, step_words)
  float* scales_;          // by token
};

/// Adds up the partial sums of all warps, always in the same order, and writes the results.
template <typename Shape>
STBLLM_DEVICE void store_block_sums(const WeightView& weights, const OutputView& output) {
  constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles;
  const auto* const partial = reinterpret_cast<const float*>(shared_memory());
  const int first_row = block_x() * kRowTiles * kTileRows;
  for (int i = thread_index(); i < kRowTiles * kTileRows * output.tokens; i += Shape::kThreads) {
    const int local_row = i % (kRowTiles * kTileRows), token = i / (kRowTiles * kTileRows);
    const int row = first_row + local_row;
    if (row >= weights.rows) continue;
    const int fragment = local_row / kTileRows * kTokenTiles + token / 8;
    const int from_lane = 4 * (local_row % kTileRows / 2) + token % 8 / 2;
    const int index = (fragment * 32 + from_lane) * 4 + 2 * (local_row % 2) + token % 2;
    float sum = 0.0f;
    for (int w = 0; w < Shape::kWarps; ++w) sum += partial[w * Shape::kPartialWords + index];
    store_result(output, static_cast<int64_t>(token) * weights.rows + row, sum * weights.scale);
  }
}

/// The grid runs over blocks of row tiles in x. `staged` and `token_scales` are as stage_token() left them;
/// for one token they are not used.
template <bool kSparse, int kPlanes, typename Shape>
STBLLM_DEVICE void gemv(const WeightView& weights, const InputView& input, const uint16_t* staged,
                        const float* token_scales, const OutputView& output) {
  const GemvWarp<kSparse, kPlanes, Shape> warp(weights, input, staged, token_scales);
  float total[Shape::kRowTiles][Shape::kTokenTiles][4] = {};
  warp.multiply(total);
  sync_threads();  // the rings become the partial sums
  warp.store_partial(total);
  sync_threads();
  store_block_sums<Shape>(weights, output);
}

}  // namespace stbllm::cuda
