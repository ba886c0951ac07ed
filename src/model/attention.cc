// out = softmax(q K^T / sqrt(dim)) V for every query, over the keys that it sees, without a row of scores in
// memory (online softmax). While a query passes its keys, three running values stand for those behind it:
//
//   largest   the largest score
//   total     the sum of exp(score - largest)
//   out       the sum of exp(score - largest) * value
//
// Whenever keys raise `largest` by d, `total` and `out` are first multiplied by exp(-d). At the end out /
// total is the result. Both ways below do this in float32:
//
// * Several queries at once (a prompt, a text to evaluate) are cut into tiles: up to kTileQueries
// neighbouring
//   queries of all heads that share keys, so that these are read once. Threads take whole tiles; lanes are
//   queries.
// * A single query (generation) makes too few tiles for the threads, so its keys are cut into parts instead.
//   Each part gives three such values, and merge_parts adds up those of all parts, brought to the same
//   largest score. Threads take whole parts; lanes are dimensions. The cut does not depend on the number of
//   threads.
//
// The slow twin is the whole matrix of scores in double precision, in tests/model/attention_test.cc.

#include "stbllm/model/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "attention_gradient.h"
#include "elements.h"
#include "single_query.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parallel.h"

namespace stbllm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Queries per head in a tile, and keys that it passes in one step. The keys and values of a step are 32 KB
/// of float32 for heads of 64 dimensions, which a core's first cache holds beside little else.
constexpr int64_t kTileQueries = 64, kStepKeys = 64;
/// Keys in a part at most, and heads of a part that pass them together.
constexpr int64_t kPartKeys = 64, kPartHeads = 4;
/// Products that are worth a second thread.
constexpr int64_t kProductsPerThread = 1 << 17;

template <typename T>
struct Attention {
  const T *queries, *keys, *values;
  T* out;  // (batch, tokens, heads, dim)
  int64_t batch, heads, kv_heads, tokens, dim;
  int64_t first;   // the key that stands where the first query does
  int64_t window;  // keys that a query sees at most; as many as there are where no window is meant
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head, token

  int64_t heads_per_key() const { return heads / kv_heads; }
  int64_t tiles_per_head() const { return ceil_div(tokens, kTileQueries); }
  int64_t padded_dim() const { return ceil_div(dim, int64_t{kLanes}) * kLanes; }
  float scale() const { return 1 / std::sqrt(static_cast<float>(dim)); }
  /// The first key that a query at `position` sees.
  int64_t oldest_seen(int64_t position) const { return std::max<int64_t>(0, position + 1 - window); }
  const T* query(int64_t sequence, int64_t head, int64_t token) const {
    return queries + offset(query_strides, sequence, head, token);
  }
  const T* key(int64_t sequence, int64_t head, int64_t token) const {
    return keys + offset(key_strides, sequence, head, token);
  }
  const T* value(int64_t sequence, int64_t head, int64_t token) const {
    return values + offset(value_strides, sequence, head, token);
  }
  static int64_t offset(const int64_t (&strides)[3], int64_t sequence, int64_t head, int64_t token) {
    return sequence * strides[0] + head * strides[1] + token * strides[2];
  }
};

/// Memory that a thread keeps from call to call.
class Buffer {
 public:
  float* reserve(int64_t count) {
    if (!memory_.defined() || memory_.numel() < count) memory_ = at::zeros({count}, at::kFloat);
    return memory_.data_ptr<float>();
  }

 private:
  at::Tensor memory_;  // libtorch aligns it to whole registers
};

/// Some neighbouring queries of all heads that share keys. A row is one query of one head; rows are counted
/// head by head.
template <typename T>
struct Tile {
  const Attention<T>& a;
  int64_t sequence, kv_head, first_query, queries;

  /// `index` counts the tiles of a head of keys, then heads of keys, then sequences.
  Tile(const Attention<T>& a, int64_t index) : a(a) {
    const int64_t tiles = a.tiles_per_head(), turn = index % tiles;
    // Early tiles see few keys, late ones many: they take turns, so that neighbouring indices cost the same.
    first_query = (turn % 2 == 0 ? turn / 2 : tiles - 1 - turn / 2) * kTileQueries;
    queries = std::min(kTileQueries, a.tokens - first_query);
    kv_head = index / tiles % a.kv_heads;
    sequence = index / tiles / a.kv_heads;
  }
  int64_t rows() const { return a.heads_per_key() * queries; }
  int64_t vectors() const { return ceil_div(rows(), int64_t{kLanes}); }
  int64_t head(int64_t row) const { return kv_head * a.heads_per_key() + row / queries; }
  int64_t query(int64_t row) const { return first_query + row % queries; }
};

/// The running values of a tile, and what its steps read. Rows lie side by side in vectors of kLanes.
struct TileState {
  int64_t padded_dim;
  float *keys, *values;    // (kStepKeys, padded_dim): of this step
  float *queries, *out;    // (vectors, padded_dim, kLanes)
  float *largest, *total;  // (vectors, kLanes)
  float* position;         // (vectors, kLanes): the last key that the row sees

  TileState(Buffer& buffer, int64_t padded_dim, int64_t vectors) : padded_dim(padded_dim) {
    const int64_t step = kStepKeys * padded_dim, panel = vectors * padded_dim * kLanes,
                  line = vectors * kLanes;
    float* next = buffer.reserve(2 * step + 2 * panel + 3 * line);
    for (const auto& [array, size] : {std::pair(&keys, step),
                                      {&values, step},
                                      {&queries, panel},
                                      {&out, panel},
                                      {&largest, line},
                                      {&total, line},
                                      {&position, line}})
      *array = std::exchange(next, next + size);
    std::fill_n(queries, panel, 0.0f);
    std::fill_n(out, panel, 0.0f);
    std::fill_n(largest, line, -kInfinity);
    std::fill_n(total, line, 0.0f);
  }
};

/// Rows of `dim` elements as float32, with zeros up to padded_dim.
template <typename Lanes, typename T>
STBLLM_INLINE void widen(const T* from, int64_t stride, int64_t rows, int64_t dim, int64_t padded_dim,
                         float* to) {
  for (int64_t row = 0; row < rows; ++row)
    for_each_lanes(0, dim, [&](int64_t at, int count) STBLLM_INLINED {
      store_lanes(to + row * padded_dim + at, load<Lanes>(from + row * stride + at, count));
    });
}

/// Keys that a tile passes in one step; state.keys and state.values hold them.
struct Step {
  int64_t first, count;
  int64_t window;
  bool all_visible;  // every row sees every key of the step
};
/// `Vectors` neighbouring vectors of rows pass a step of keys. Eight sums at a time, each in registers of its
/// own, hide the latency of an addition.
template <typename Lanes, int Vectors>
STBLLM_INLINE void pass_keys(const Step& step, const TileState& state, int64_t first_vector) {
  constexpr int kTogether = 8 / Vectors;  // keys, or dimensions of values, that are summed up together
  const int64_t dims = state.padded_dim, panel = dims * kLanes;
  const float* queries = state.queries + first_vector * panel;
  float* out = state.out + first_vector * panel;
  float *largest = state.largest + first_vector * kLanes, *total = state.total + first_vector * kLanes;
  const Lanes lowest = Lanes{} - kInfinity;
  Lanes highest[Vectors], scores[kStepKeys][Vectors];
  for (int v = 0; v < Vectors; ++v) highest[v] = load_lanes<Lanes>(largest + v * kLanes);
  // Behind the last key the state holds keys of an earlier step, whose scores are dropped.
  for (int64_t key = 0; key < step.count; key += kTogether) {
    const float* rows = state.keys + key * dims;
    Lanes sums[kTogether][Vectors] = {};
    for (int64_t d = 0; d < dims; ++d)
      for (int k = 0; k < kTogether; ++k)
        for (int v = 0; v < Vectors; ++v)
          sums[k][v] += load_lanes<Lanes>(queries + v * panel + d * kLanes) * rows[k * dims + d];
    for (int k = 0; k < kTogether && key + k < step.count; ++k)
      for (int v = 0; v < Vectors; ++v) {
        Lanes score = sums[k][v];
        if (!step.all_visible) {
          const Lanes distance = load_lanes<Lanes>(state.position + (first_vector + v) * kLanes) -
                                 static_cast<float>(step.first + key + k);
          score = select((distance >= 0.f) & (distance < static_cast<float>(step.window)), score, lowest);
        }
        scores[key + k][v] = score;
        highest[v] = select(score > highest[v], score, highest[v]);
      }
  }
  Lanes shrink[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    const Lanes base = select(highest[v] == lowest, Lanes{}, highest[v]);  // a row that has seen no key yet
    shrink[v] = exp_of(load_lanes<Lanes>(largest + v * kLanes) - base);
    Lanes sum = load_lanes<Lanes>(total + v * kLanes) * shrink[v];
    for (int64_t key = 0; key < step.count; ++key) {
      scores[key][v] = exp_of(scores[key][v] - base);
      sum += scores[key][v];
    }
    store_lanes(largest + v * kLanes, highest[v]);
    store_lanes(total + v * kLanes, sum);
  }
  for (int64_t d = 0; d < dims; d += kTogether) {
    const float* values = state.values + d;
    Lanes sums[kTogether][Vectors];
    for (int k = 0; k < kTogether; ++k)
      for (int v = 0; v < Vectors; ++v)
        sums[k][v] = load_lanes<Lanes>(out + v * panel + (d + k) * kLanes) * shrink[v];
    for (int64_t key = 0; key < step.count; ++key)
      for (int k = 0; k < kTogether; ++k)
        for (int v = 0; v < Vectors; ++v) sums[k][v] += scores[key][v] * values[key * dims + k];
    for (int k = 0; k < kTogether; ++k)
      for (int v = 0; v < Vectors; ++v) store_lanes(out + v * panel + (d + k) * kLanes, sums[k][v]);
  }
}

/// Scaled queries and positions of a tile, row by row, into its state.
template <typename Lanes, typename T>
STBLLM_INLINE void load_queries(const Tile<T>& tile, const TileState& state) {
  const Attention<T>& a = tile.a;
  const float scale = a.scale();
  // Lanes behind the last row stand where the first query does: they see keys too, so that no total is 0.
  std::fill_n(state.position, tile.vectors() * kLanes, static_cast<float>(a.first + tile.first_query));
  for (int64_t row = 0; row < tile.rows(); ++row) {
    float* to = state.queries + row / kLanes * state.padded_dim * kLanes + row % kLanes;
    const T* from = a.query(tile.sequence, tile.head(row), tile.query(row));
    for_each_lanes(0, a.dim, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes x = load<Lanes>(from + at, count) * scale;
      float values[kLanes];
      store_lanes(values, x);
      for (int d = 0; d < kLanes; ++d) to[(at + d) * kLanes] = values[d];
    });
    state.position[row] = static_cast<float>(a.first + tile.query(row));
  }
}

/// out / total of a tile, row by row, into the result.
template <typename Lanes, typename T>
STBLLM_INLINE void store_results(const Tile<T>& tile, const TileState& state) {
  const Attention<T>& a = tile.a;
  for (int64_t vector = 0; vector < tile.vectors(); ++vector) {
    const Lanes inverse = 1.f / load_lanes<Lanes>(state.total + vector * kLanes);
    for (int64_t d = 0; d < a.dim; ++d) {
      float* out = state.out + (vector * state.padded_dim + d) * kLanes;
      store_lanes(out, rounded<T>(load_lanes<Lanes>(out) * inverse));
    }
  }
  for (int64_t row = 0; row < tile.rows(); ++row) {
    const float* from = state.out + row / kLanes * state.padded_dim * kLanes + row % kLanes;
    T* to = a.out + ((tile.sequence * a.tokens + tile.query(row)) * a.heads + tile.head(row)) * a.dim;
    for (int64_t d = 0; d < a.dim; ++d) store(to + d, from[d * kLanes]);
  }
}

template <typename Lanes, typename T>
STBLLM_INLINE void attend_tile_of(const Attention<T>& a, int64_t index, Buffer& buffer) {
  const Tile<T> tile(a, index);
  const int64_t vectors = tile.vectors();
  const TileState state(buffer, a.padded_dim(), vectors);
  load_queries<Lanes>(tile, state);
  // Keys at the first query and behind the last.
  const int64_t nearest = a.first + tile.first_query, end = nearest + tile.queries;
  for (int64_t key = a.oldest_seen(nearest); key < end; key += kStepKeys) {
    const int64_t count = std::min(kStepKeys, end - key);
    widen<Lanes>(a.key(tile.sequence, tile.kv_head, key), a.key_strides[2], count, a.dim, state.padded_dim,
                 state.keys);
    widen<Lanes>(a.value(tile.sequence, tile.kv_head, key), a.value_strides[2], count, a.dim,
                 state.padded_dim, state.values);
    const Step step{.first = key,
                    .count = count,
                    .window = a.window,
                    .all_visible = key + count - 1 <= nearest && end - key <= a.window};
    int64_t vector = 0;
    for (; vector + 2 <= vectors; vector += 2) pass_keys<Lanes, 2>(step, state, vector);
    if (vector < vectors) pass_keys<Lanes, 1>(step, state, vector);
  }
  store_results<Lanes>(tile, state);
}
template <typename T>
void attend_tile(const Attention<T>& a, int64_t index, Buffer& buffer) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { attend_tile_of<Lanes>(a, index, buffer); });
}

/// The three values of every part of the keys of a single query: for each head `largest`, `total`, then `out`
/// (padded_dim).
struct Parts {
  float* memory;
  int64_t count;  // parts of the keys
  int64_t heads;  // that share keys
  int64_t padded_dim;

  int64_t stride() const { return padded_dim + 2; }
  float* largest(int64_t kv_item, int64_t part, int64_t head) const {
    return memory + ((kv_item * count + part) * heads + head) * stride();
  }
  float* total(int64_t kv_item, int64_t part, int64_t head) const { return largest(kv_item, part, head) + 1; }
  float* out(int64_t kv_item, int64_t part, int64_t head) const { return largest(kv_item, part, head) + 2; }
};

/// The single query of `Heads` neighbouring heads that share keys passes one part of them. `index` counts
/// parts, then heads of keys, then sequences. `queries` has room for (Heads, padded_dim).
template <int Heads, typename Lanes, typename T>
STBLLM_INLINE void attend_part(const Attention<T>& a, int64_t index, int64_t first_head, const Parts& parts,
                               float* queries) {
  constexpr int kTogether = 4;  // keys, and vectors of values: as many loads are under way
  const int64_t part = index % parts.count, kv_item = index / parts.count;
  const int64_t kv_head = kv_item % a.kv_heads, sequence = kv_item / a.kv_heads;
  const int64_t seen = a.first + 1, first_key = seen * part / parts.count;
  const int64_t count = seen * (part + 1) / parts.count - first_key, padded_dim = parts.padded_dim;
  const float scale = a.scale();
  for (int h = 0; h < Heads; ++h) {
    const T* from = a.query(sequence, kv_head * parts.heads + first_head + h, 0);
    for_each_lanes(0, a.dim, [&](int64_t at, int lanes) STBLLM_INLINED {
      store_lanes(queries + h * padded_dim + at, load<Lanes>(from + at, lanes) * scale);
    });
  }

  alignas(64) float scores[Heads][kPartKeys];
  const T* keys = a.key(sequence, kv_head, first_key);
  for (int64_t key = 0; key < count; key += kTogether) {
    Lanes sums[kTogether][Heads] = {};
    for_each_lanes(0, a.dim, [&](int64_t at, int lanes) STBLLM_INLINED {
      for (int k = 0; k < kTogether; ++k) {  // the last key again behind the last
        const Lanes x = load<Lanes>(keys + std::min(key + k, count - 1) * a.key_strides[2] + at, lanes);
        for (int h = 0; h < Heads; ++h) sums[k][h] += load_lanes<Lanes>(queries + h * padded_dim + at) * x;
      }
    });
    for (int k = 0; k < kTogether; ++k)
      for (int h = 0; h < Heads; ++h) scores[h][key + k] = sum_of(sums[k][h]);
  }

  float* out[Heads];
  for (int h = 0; h < Heads; ++h) {
    float* own = scores[h];
    const int64_t end = ceil_div(count, int64_t{kLanes}) * kLanes;
    std::fill(own + count, own + end, -kInfinity);
    const float largest = *std::max_element(own, own + count);
    Lanes total = {};
    for (int64_t at = 0; at < end; at += kLanes) {
      const Lanes weight = exp_of(load_lanes<Lanes>(own + at) - largest);
      store_lanes(own + at, weight);
      total += weight;
    }
    *parts.largest(kv_item, part, first_head + h) = largest;
    *parts.total(kv_item, part, first_head + h) = sum_of(total);
    out[h] = parts.out(kv_item, part, first_head + h);
  }

  const T* values = a.value(sequence, kv_head, first_key);
  const auto mix = [&](int64_t at, int lanes, auto vectors) STBLLM_INLINED {
    Lanes sums[vectors][Heads] = {};
    for (int64_t key = 0; key < count; ++key)
      for (int v = 0; v < vectors; ++v) {
        const Lanes x = load<Lanes>(values + key * a.value_strides[2] + at + v * kLanes, lanes);
        for (int h = 0; h < Heads; ++h) sums[v][h] += x * scores[h][key];
      }
    for (int v = 0; v < vectors; ++v)
      for (int h = 0; h < Heads; ++h) store_lanes(out[h] + at + v * kLanes, sums[v][h]);
  };
  int64_t at = 0;
  for (; at + kTogether * kLanes <= a.dim; at += kTogether * kLanes)
    mix(at, kLanes, std::integral_constant<int, kTogether>());
  for_each_lanes(at, a.dim, [&](int64_t rest, int lanes) STBLLM_INLINED {
    mix(rest, lanes, std::integral_constant<int, 1>());
  });
}
template <typename Lanes, typename T>
STBLLM_INLINE void attend_parts_of(const Attention<T>& a, int64_t begin, int64_t end, const Parts& parts,
                                   float* queries) {
  for (int64_t index = begin; index < end; ++index)
    for (int64_t head = 0; head < parts.heads; head += kPartHeads)
      switch (std::min(kPartHeads, parts.heads - head)) {
        case 1:
          attend_part<1, Lanes>(a, index, head, parts, queries);
          break;
        case 2:
          attend_part<2, Lanes>(a, index, head, parts, queries);
          break;
        case 3:
          attend_part<3, Lanes>(a, index, head, parts, queries);
          break;
        default:
          attend_part<kPartHeads, Lanes>(a, index, head, parts, queries);
          break;
      }
}
template <typename T>
void attend_parts(const Attention<T>& a, int64_t begin, int64_t end, const Parts& parts, float* queries) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { attend_parts_of<Lanes>(a, begin, end, parts, queries); });
}

/// The result of every head from its parts. Afterwards `largest` holds the factor that the part was given.
template <typename Lanes, typename T>
STBLLM_INLINE void merge_parts_of(const Attention<T>& a, const Parts& parts, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t kv_item = row / parts.heads, head = row % parts.heads;
    float largest = *parts.largest(kv_item, 0, head), total = 0;
    for (int64_t part = 1; part < parts.count; ++part)
      largest = std::max(largest, *parts.largest(kv_item, part, head));
    for (int64_t part = 0; part < parts.count; ++part) {
      float* const factor = parts.largest(kv_item, part, head);
      *factor = std::exp(*factor - largest);
      total += *factor * *parts.total(kv_item, part, head);
    }
    for_each_lanes(0, a.dim, [&](int64_t at, int lanes) STBLLM_INLINED {
      Lanes sum = {};
      for (int64_t part = 0; part < parts.count; ++part)
        sum += load_lanes<Lanes>(parts.out(kv_item, part, head) + at) * *parts.largest(kv_item, part, head);
      store(a.out + row * a.dim + at, rounded<T>(sum / total), lanes);
    });
  }
}
template <typename T>
void merge_parts(const Attention<T>& a, const Parts& parts, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { merge_parts_of<Lanes>(a, parts, begin, end); });
}

template <typename T>
void attend_by_tiles(const Attention<T>& a) {
  const int64_t tiles = a.batch * a.kv_heads * a.tiles_per_head();
  const int64_t products_per_tile =
      2 * a.heads_per_key() * std::min(a.tokens, kTileQueries) * (a.first + a.tokens) * a.dim;
  at::parallel_for(0, tiles, std::max<int64_t>(1, kProductsPerThread / products_per_tile),
                   [&](int64_t begin, int64_t end) {
                     thread_local Buffer buffer;
                     for (int64_t index = begin; index < end; ++index) attend_tile(a, index, buffer);
                   });
}

/// The parts of a single query, whose memory is still to be given.
template <typename T>
Parts parts_of(const Attention<T>& a) {
  return {.memory = nullptr,
          .count = ceil_div(a.first + 1, kPartKeys),
          .heads = a.heads_per_key(),
          .padded_dim = a.padded_dim()};
}

template <typename T>
void attend_by_parts(const Attention<T>& a) {
  const int64_t kv_items = a.batch * a.kv_heads;
  thread_local Buffer results;
  Parts parts = parts_of(a);
  parts.memory = results.reserve(kv_items * parts.count * parts.heads * parts.stride());
  const int64_t products_per_part = 2 * parts.heads * std::min(a.first + 1, kPartKeys) * a.dim;
  at::parallel_for(0, kv_items * parts.count, std::max<int64_t>(1, kProductsPerThread / products_per_part),
                   [&](int64_t begin, int64_t end) {
                     thread_local Buffer queries;
                     attend_parts(a, begin, end, parts, queries.reserve(kPartHeads * parts.padded_dim));
                   });
  merge_parts(a, parts, 0, a.batch * a.heads);
}

/// The single query of one sequence.
Attention<uint16_t> attention_of(const SingleQuery& query) {
  const int64_t unseen = query.window > 0 ? std::max<int64_t>(0, query.position + 1 - query.window) : 0;
  return {.queries = query.queries,
          .keys = query.keys + unseen * query.dim,
          .values = query.values + unseen * query.dim,
          .out = query.out,
          .batch = 1,
          .heads = query.heads,
          .kv_heads = query.kv_heads,
          .tokens = 1,
          .dim = query.dim,
          .first = query.position - unseen,
          .window = query.position + 1,
          .query_strides = {0, query.dim, 0},
          .key_strides = {0, query.head_stride, query.dim},
          .value_strides = {0, query.head_stride, query.dim}};
}

template <typename T>
void attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, int64_t first,
            int64_t window, at::Tensor& out) {
  // Keys that no query sees are left out here, so that only tiles need to know of windows.
  const int64_t unseen = window > 0 ? std::max<int64_t>(0, first + 1 - window) : 0;
  Attention<T> a{.queries = static_cast<const T*>(queries.const_data_ptr()),
                 .keys = static_cast<const T*>(keys.const_data_ptr()) + unseen * keys.stride(2),
                 .values = static_cast<const T*>(values.const_data_ptr()) + unseen * values.stride(2),
                 .out = static_cast<T*>(out.data_ptr()),
                 .batch = queries.size(0),
                 .heads = queries.size(1),
                 .kv_heads = keys.size(1),
                 .tokens = queries.size(2),
                 .dim = queries.size(3),
                 .first = first - unseen,
                 .window = window > 0 ? window : keys.size(2),
                 .query_strides = {},
                 .key_strides = {},
                 .value_strides = {}};
  for (int i = 0; i < 3; ++i) {
    a.query_strides[i] = queries.stride(i);
    a.key_strides[i] = keys.stride(i);
    a.value_strides[i] = values.stride(i);
  }
  a.tokens == 1 ? attend_by_parts(a) : attend_by_tiles(a);
}

/// causal_attention() of the first tokens while somebody records gradients.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& queries,
                            const at::Tensor& keys, const at::Tensor& values, int64_t window) {
    context->save_for_backward({queries, keys, values});
    context->saved_data["window"] = window;
    return causal_attention(queries, keys, values, 0, window);
  }
  static torch::autograd::tensor_list backward(torch::autograd::AutogradContext* context,
                                               const torch::autograd::tensor_list& gradients) {
    const torch::autograd::tensor_list saved = context->get_saved_variables();
    const AttentionGradients result = attention_gradients(
        saved[0], saved[1], saved[2], context->saved_data["window"].toInt(), gradients[0].contiguous());
    return {result.queries, result.keys, result.values, {}};
  }
};

}  // namespace

int64_t single_query_floats(const SingleQuery& query) {
  const Parts parts = parts_of(attention_of(query));
  return query.kv_heads * parts.count * parts.heads * parts.stride();
}

void attend_single_query(const SingleQuery& query, float* memory, const TeamPlace& team) {
  const Attention<uint16_t> a = attention_of(query);
  Parts parts = parts_of(a);
  parts.memory = memory;
  thread_local Buffer queries;
  attend_parts(a, team.begin(a.kv_heads * parts.count), team.end(a.kv_heads * parts.count), parts,
               queries.reserve(kPartHeads * parts.padded_dim));
  team.wait_for_all();
  merge_parts(a, parts, team.begin(a.heads), team.end(a.heads));
}

at::Tensor causal_attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                            int64_t first, int64_t window) {
  for (const at::Tensor& tensor : {keys, values})
    STBLLM_CHECK(tensor.scalar_type() == queries.scalar_type() && tensor.stride(-1) == 1 &&
                     tensor.size(0) == queries.size(0) && tensor.size(1) == keys.size(1) &&
                     tensor.size(2) == first + queries.size(2) && tensor.size(3) == queries.size(3),
                 "{} queries at {} for keys or values of shape [{}, {}, {}, {}]", queries.size(2), first,
                 tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3));
  STBLLM_CHECK(queries.stride(-1) == 1 && queries.size(2) > 0, "{} queries, neighbours {} apart",
               queries.size(2), queries.stride(-1));
  STBLLM_CHECK(queries.size(1) % keys.size(1) == 0, "{} heads share {}", queries.size(1), keys.size(1));
  if (at::GradMode::is_enabled() &&
      (queries.requires_grad() || keys.requires_grad() || values.requires_grad())) {
    STBLLM_CHECK(first == 0, "gradients of attention at position {}", first);
    return AttentionFunction::apply(queries, keys, values, window);
  }
  at::Tensor out =
      at::empty({queries.size(0), queries.size(2), queries.size(1) * queries.size(3)}, queries.options());
  if (queries.scalar_type() == at::kFloat)
    attend<float>(queries, keys, values, first, window, out);
  else
    attend<uint16_t>(queries, keys, values, first, window, out);
  return out;
}

}  // namespace stbllm
