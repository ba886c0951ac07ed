#pragma once
// y (tokens, rows) = x (tokens, cols) W^T for 1..16 tokens: bound by the bytes of W.
//
// Every warp streams records of its own through a private cp.async ring (no barrier between warps) and
// multiplies them by mma with the tokens as the 8 columns of B: unused columns cost nothing that is scarce.
// One-level 2:4 weights cost about 0.7 integer operations per lane and weight, so 132 SMs at 1.7 GHz decode
// 20e12 weights/s, which at 1.375 bits is 3.5 TB/s: the bound of an H100's memory, just reached.
//
// A block owns kRowTiles row tiles; its warps divide K and add up in a fixed order at the end. Activations
// go to shared memory in the order of B fragments. Those of one token are converted on the way, per warp and
// tile with a power-of-two scale of their own; those of several have been converted before, once instead of
// in every block (both: activations.cuh). Twin: the harness tests run this body against
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

/// Grid: x over blocks of row tiles. `staged` and `token_scales` as stage_token() left them; for one token
/// they are not used.
template <bool kSparse, int kPlanes, typename Shape>
STBLLM_DEVICE void gemv(const WeightView& weights, const InputView& input, const uint16_t* staged,
                        const float* token_scales, const OutputView& output) {
  constexpr int kRowTiles = Shape::kRowTiles, kTokenTiles = Shape::kTokenTiles, kStages = Shape::kStages;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, tokens = input.tokens;
  const int first_tile = block_x() * kRowTiles;
  const int record_words = weights.record_words;
  const int extra_tiles = (weights.extra_steps * kExtraColumns + kTileColumns - 1) / kTileColumns;
  const int tiles = weights.column_tiles + extra_tiles, step_words = Shape::step_words(tokens);
  auto* const memory = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t* const ring = memory + warp * Shape::warp_words(record_words, tokens);
  uint32_t* const activations = ring + kStages * kRowTiles * record_words;
  auto* const scales = reinterpret_cast<float*>(activations + Shape::kSteps * step_words);

  const auto row_tile = [&](int r) -> int64_t {
    return first_tile + r < weights.row_tiles ? first_tile + r : weights.row_tiles - 1;
  };
  const auto load = [&](int tile, int slot) {
    if (tile < weights.column_tiles)
      for (int r = 0; r < kRowTiles; ++r) {
        const uint32_t* const from =
            weights.records + (row_tile(r) * weights.column_tiles + tile) * record_words;
        uint32_t* const to = ring + (slot * kRowTiles + r) * record_words;
        for (int i = lane; i < record_words / 4; i += 32) copy_async_16(to + 4 * i, from + 4 * i, true);
      }
    commit_copies();
  };
  // Lane l brings columns 8 l .. 8 l + 7: step l / 4, register l % 4 of the four members' B fragments.
  const auto bring = [&](int tile) {
    const int column = tile * kTileColumns + 8 * lane;
    const auto put = [&](int token, const Words4& halves, float down) {
      uint32_t* const to = activations + lane / 4 * step_words + 16 * token + lane % 4;
#pragma unroll
      for (int member = 0; member < 4; ++member) to[4 * member] = halves.word[member];
      if (lane == 0) scales[token] = down;
    };
    if (tokens == 1) {
      float value[8];
      load_activations(weights, input, 0, column, value);
      const TokenScale scale(warp_max(largest_of(value)));
      put(0, pack_halves(value, scale.up), scale.down);
      return;
    }
    const int width = staged_width(weights);
    for (int token = 0; token < tokens; ++token) {
      Words4 halves = {};
      if (column < width)
        halves = *reinterpret_cast<const Words4*>(staged + static_cast<int64_t>(token) * width + column);
      put(token, halves, token_scales[token]);
    }
  };
  const auto load_b = [&](uint32_t(&b)[kTokenTiles][4], int step) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
      const int token = 8 * n + lane / 4;
      Words4 words = {};
      if (token < tokens)
        words =
            *reinterpret_cast<const Words4*>(activations + step * step_words + 16 * token + 4 * (lane % 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n][i] = words.word[i];
    }
  };

  float total[kRowTiles][kTokenTiles][4] = {};
  for (int i = 0; i < kStages - 1; ++i) load(warp + i * Shape::kWarps, i);
  for (int tile = warp, slot = 0; tile < tiles; tile += Shape::kWarps, slot = (slot + 1) % kStages) {
    load(tile + (kStages - 1) * Shape::kWarps, (slot + kStages - 1) % kStages);
    bring(tile);
    wait_copies<kStages - 1>();
    sync_warp();

    float part[kRowTiles][kTokenTiles][4] = {};
    uint32_t b[2][kTokenTiles][4];
    if (tile < weights.column_tiles) {
      const uint32_t* const records = ring + slot * kRowTiles * record_words;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        load_b(b[0], 2 * c);
        load_b(b[1], 2 * c + 1);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const TileChunk<kSparse, kPlanes> weight(records + r * record_words, weights.levels, c, lane);
          weight.multiply(part[r], b[0], 0);
          weight.multiply(part[r], b[1], 1);
        }
      }
    } else {
      const int first_step = (tile - weights.column_tiles) * (kTileColumns / kExtraColumns);
#pragma unroll 1  // rare
      for (int step = 0; step < 16 && first_step + step < weights.extra_steps; ++step) {
        load_b(b[0], step / 2);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          const Words4 a = reinterpret_cast<const Words4*>(
              weights.extra_values)[(row_tile(r) * weights.extra_steps + first_step + step) * 32 + lane];
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n)
            mma(part[r][n], a.word, step % 2 == 0 ? b[0][n][0] : b[0][n][2],
                step % 2 == 0 ? b[0][n][1] : b[0][n][3]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + d_element(lane, i).col;
        const float scale = token < tokens ? scales[token] : 0.0f;
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) total[r][n][i] += part[r][n][i] * scale;
      }
    sync_warp();  // the slot and the activations may be overwritten
  }

  sync_threads();  // the rings become the partial sums
  auto* const partial = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        partial[warp * Shape::kPartialWords + ((r * kTokenTiles + n) * 32 + lane) * 4 + i] = total[r][n][i];
  sync_threads();
  for (int i = thread; i < kRowTiles * kTileRows * tokens; i += Shape::kThreads) {
    const int local_row = i % (kRowTiles * kTileRows), token = i / (kRowTiles * kTileRows);
    const int row = first_tile * kTileRows + local_row;
    if (row >= weights.rows) continue;
    const int fragment = local_row / kTileRows * kTokenTiles + token / 8;
    const int from_lane = 4 * (local_row % kTileRows / 2) + token % 8 / 2;
    const int index = (fragment * 32 + from_lane) * 4 + 2 * (local_row % 2) + token % 2;
    float sum = 0.0f;
    for (int w = 0; w < Shape::kWarps; ++w) sum += partial[w * Shape::kPartialWords + index];
    store_result(output, static_cast<int64_t>(token) * weights.rows + row, sum * weights.scale);
  }
}

}  // namespace stbllm::cuda
