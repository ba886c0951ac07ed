#include "stbllm/model/attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "elements.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

/// Queries of each head and keys that meet in one go: 32 KB of keys and values as float32 for heads of 64.
constexpr int64_t kQueries = 64, kKeys = 64;
/// Products that are worth a second thread.
constexpr int64_t kProductsPerThread = 1 << 17;

/// Heads of a single query that meet keys together, and keys in one go.
constexpr int64_t kHeadsAlone = 4, kKeysAlone = 64;

template <typename T>
struct Attention {
  const T *queries, *keys, *values;
  T* out;  // (batch, tokens, heads, dim)
  int64_t heads, kv_heads, tokens, dim, first;
  int64_t window;  // as many as there are keys where none is meant
  int64_t query_strides[3], key_strides[3], value_strides[3];  // of batch, head, token

  int64_t heads_per_key() const { return heads / kv_heads; }
  int64_t query_blocks() const { return ceil_div(tokens, kQueries); }
  /// The first position that the query at `position` sees.
  int64_t oldest_seen(int64_t position) const { return std::max<int64_t>(0, position + 1 - window); }
  const T* query(int64_t batch, int64_t head, int64_t token) const {
    return queries + offset(query_strides, batch, head, token);
  }
  const T* key(int64_t batch, int64_t head, int64_t token) const {
    return keys + offset(key_strides, batch, head, token);
  }
  const T* value(int64_t batch, int64_t head, int64_t token) const {
    return values + offset(value_strides, batch, head, token);
  }
  static int64_t offset(const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t token) {
    return batch * strides[0] + head * strides[1] + token * strides[2];
  }
  int64_t padded_dim() const { return ceil_div(dim, int64_t{kLanes}) * kLanes; }
};

/// What one thread works with. Queries lie side by side in vectors of kLanes.
struct Scratch {
  at::Tensor memory;       // libtorch aligns to whole registers
  float *keys, *values;    // (kKeys, padded dim)
  float *queries, *out;    // (vectors, padded dim, kLanes)
  float *largest, *total;  // (vectors, kLanes): of the scores, of their exponentials
  float* position;         // (vectors, kLanes)

  float* reserve(int64_t count) {
    if (!memory.defined() || memory.numel() < count) memory = at::zeros({count}, at::kFloat);
    return memory.data_ptr<float>();
  }
  void resize(int64_t padded_dim, int64_t vectors) {
    const int64_t block = kKeys * padded_dim, panel = vectors * padded_dim * kLanes, row = vectors * kLanes;
    float* next = reserve(2 * block + 2 * panel + 3 * row);
    for (const auto& [part, size] : {std::pair(&keys, block),
                                     {&values, block},
                                     {&queries, panel},
                                     {&out, panel},
                                     {&largest, row},
                                     {&total, row},
                                     {&position, row}})
      *part = std::exchange(next, next + size);
    std::fill_n(queries, panel, 0.0f);
    std::fill_n(out, panel, 0.0f);
    std::fill_n(largest, row, -std::numeric_limits<float>::infinity());
    std::fill_n(total, row, 0.0f);
  }
};

STBLLM_INLINE void store_one(float* to, float x) { *to = x; }
STBLLM_INLINE void store_one(uint16_t* to, float rounded) {
  *to = static_cast<uint16_t>(std::bit_cast<uint32_t>(rounded) >> 16);
}

/// Rows as float32, zeros behind `dim`.
template <typename T>
STBLLM_INLINE void widen(const T* from, int64_t stride, int64_t rows, int64_t dim, int64_t padded,
                         float* to) {
  for (int64_t row = 0; row < rows; ++row)
    for_each_lanes(
        0, dim, [&](int64_t at, int count) __attribute__((always_inline)) {
          store_lanes(to + row * padded + at, load(from + row * stride + at, count));
        });
}

struct Meeting {
  int64_t count, padded, first_key, window;  // of keys; the dim; the position of the first key
  bool all_visible;
};
/// The queries of neighbouring vectors meet keys and values. Sums in eight registers hide the latency of an
/// addition.
template <int Vectors>
STBLLM_INLINE void meet(const Meeting& meeting, const Scratch& scratch, int64_t first_vector) {
  constexpr int kTogether = 8 / Vectors;  // keys, or dimensions of values, that are summed up together
  const int64_t padded = meeting.padded, panel = padded * kLanes;
  const float* queries = scratch.queries + first_vector * panel;
  float* out = scratch.out + first_vector * panel;
  float *largest = scratch.largest + first_vector * kLanes, *total = scratch.total + first_vector * kLanes;
  const Lanes lowest = Lanes{} - std::numeric_limits<float>::infinity();
  Lanes highest[Vectors], scores[kKeys][Vectors];
  for (int v = 0; v < Vectors; ++v) highest[v] = load_lanes(largest + v * kLanes);
  for (int64_t key = 0; key < meeting.count;
       key += kTogether) {  // the scratch holds old keys behind the last, whose scores are dropped
    const float* rows = scratch.keys + key * padded;
    Lanes sums[kTogether][Vectors] = {};
    for (int64_t d = 0; d < padded; ++d)
      for (int k = 0; k < kTogether; ++k)
        for (int v = 0; v < Vectors; ++v)
          sums[k][v] += load_lanes(queries + v * panel + d * kLanes) * rows[k * padded + d];
    for (int k = 0; k < kTogether && key + k < meeting.count; ++k)
      for (int v = 0; v < Vectors; ++v) {
        Lanes score = sums[k][v];
        if (!meeting.all_visible) {
          const Lanes distance = load_lanes(scratch.position + (first_vector + v) * kLanes) -
                                 static_cast<float>(meeting.first_key + key + k);
          score = (distance >= 0) & (distance < static_cast<float>(meeting.window)) ? score : lowest;
        }
        scores[key + k][v] = score;
        highest[v] = score > highest[v] ? score : highest[v];
      }
  }
  Lanes shrink[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    const Lanes base = highest[v] == lowest ? Lanes{} : highest[v];  // a query that has seen no key yet
    shrink[v] = exp_of(load_lanes(largest + v * kLanes) - base);
    Lanes sum = load_lanes(total + v * kLanes) * shrink[v];
    for (int64_t key = 0; key < meeting.count; ++key) {
      scores[key][v] = exp_of(scores[key][v] - base);
      sum += scores[key][v];
    }
    store_lanes(largest + v * kLanes, highest[v]);
    store_lanes(total + v * kLanes, sum);
  }
  for (int64_t d = 0; d < padded; d += kTogether) {
    const float* values = scratch.values + d;
    Lanes sums[kTogether][Vectors];
    for (int k = 0; k < kTogether; ++k)
      for (int v = 0; v < Vectors; ++v)
        sums[k][v] = load_lanes(out + v * panel + (d + k) * kLanes) * shrink[v];
    for (int64_t key = 0; key < meeting.count; ++key)
      for (int k = 0; k < kTogether; ++k)
        for (int v = 0; v < Vectors; ++v) sums[k][v] += scores[key][v] * values[key * padded + k];
    for (int k = 0; k < kTogether; ++k)
      for (int v = 0; v < Vectors; ++v) store_lanes(out + v * panel + (d + k) * kLanes, sums[k][v]);
  }
}

/// One block of queries of all heads that share keys: `item` counts blocks, then heads of keys, then
/// sequences.
template <typename T>
STBLLM_INLINE void attend_of(const Attention<T>& a, int64_t item, Scratch& scratch) {
  const int64_t blocks = a.query_blocks(), heads = a.heads_per_key(), padded = a.padded_dim();
  // Early blocks see few keys, late ones many: they take turns, so that neighbouring items cost the same.
  const int64_t turn = item % blocks, block = turn % 2 == 0 ? turn / 2 : blocks - 1 - turn / 2;
  const int64_t kv_head = item / blocks % a.kv_heads, batch = item / blocks / a.kv_heads;
  const int64_t first_query = block * kQueries, queries = std::min(kQueries, a.tokens - first_query);
  const int64_t rows = heads * queries, vectors = ceil_div(rows, int64_t{kLanes});
  const auto head_of = [&](int64_t row) { return kv_head * heads + row / queries; };
  const auto query_of = [&](int64_t row) { return first_query + row % queries; };

  scratch.resize(padded, vectors);
  std::fill_n(scratch.position, vectors * kLanes,
              static_cast<float>(a.first + first_query));  // of lanes behind the last query too
  const float scale = 1 / std::sqrt(static_cast<float>(a.dim));
  for (int64_t row = 0; row < rows; ++row) {
    float* to = scratch.queries + row / kLanes * padded * kLanes + row % kLanes;
    const T* from = a.query(batch, head_of(row), query_of(row));
    for_each_lanes(
        0, a.dim, [&](int64_t at, int count) __attribute__((always_inline)) {
          const Lanes x = load(from + at, count) * scale;
          for (int d = 0; d < kLanes; ++d) to[(at + d) * kLanes] = x[d];
        });
    scratch.position[row] = static_cast<float>(a.first + query_of(row));
  }

  const int64_t nearest = a.first + first_query,
                farthest = nearest + queries;  // positions of the first query, behind the last
  for (int64_t key = a.oldest_seen(nearest); key < farthest; key += kKeys) {
    const int64_t count = std::min(kKeys, farthest - key);
    widen(a.key(batch, kv_head, key), a.key_strides[2], count, a.dim, padded, scratch.keys);
    widen(a.value(batch, kv_head, key), a.value_strides[2], count, a.dim, padded, scratch.values);
    const bool all_visible = key + count - 1 <= nearest && farthest - key <= a.window;
    const Meeting meeting{count, padded, key, a.window, all_visible};
    int64_t vector = 0;
    for (; vector + 2 <= vectors; vector += 2) meet<2>(meeting, scratch, vector);
    if (vector < vectors) meet<1>(meeting, scratch, vector);
  }

  for (int64_t vector = 0; vector < vectors; ++vector) {
    const Lanes inverse = 1 / load_lanes(scratch.total + vector * kLanes);
    for (int64_t d = 0; d < a.dim; ++d) {
      float* out = scratch.out + (vector * padded + d) * kLanes;
      store_lanes(out, rounded<T>(load_lanes(out) * inverse));
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = scratch.out + row / kLanes * padded * kLanes + row % kLanes;
    T* to = a.out + ((batch * a.tokens + query_of(row)) * a.heads + head_of(row)) * a.dim;
    for (int64_t d = 0; d < a.dim; ++d) store_one(to + d, from[d * kLanes]);
  }
}
STBLLM_CLONES void attend(const Attention<float>& a, int64_t item, Scratch& scratch) {
  attend_of(a, item, scratch);
}
STBLLM_CLONES void attend(const Attention<uint16_t>& a, int64_t item, Scratch& scratch) {
  attend_of(a, item, scratch);
}

/// What a single query makes of parts of the keys: for each head and part the largest score, the sum of
/// exponentials below it, and the values (padded dim) weighted by these.
struct Parts {
  float* memory;
  int64_t count, heads, padded;  // per head of keys; query heads that share it; dim

  int64_t stride() const { return padded + 2; }
  float* at(int64_t kv_item, int64_t part, int64_t head) const {
    return memory + ((kv_item * count + part) * heads + head) * stride();
  }
};

/// A single query of `Heads` of the heads that share keys meets kKeysAlone keys at most; lanes are
/// dimensions. `item` counts parts of the keys, then heads of keys, then sequences.
template <int Heads, typename T>
STBLLM_INLINE void attend_part_of(const Attention<T>& a, int64_t item, int64_t first_head, const Parts& parts,
                                  float* queries) {
  constexpr int kTogether = 4;  // keys, and vectors of values: as many loads are under way
  const int64_t part = item % parts.count, kv_item = item / parts.count, kv_head = kv_item % a.kv_heads,
                batch = kv_item / a.kv_heads;
  const int64_t seen = a.first + 1 - a.oldest_seen(a.first), first_key = seen * part / parts.count;
  const int64_t count = seen * (part + 1) / parts.count - first_key, padded = parts.padded;
  const float scale = 1 / std::sqrt(static_cast<float>(a.dim));
  for (int h = 0; h < Heads; ++h) {
    const T* from = a.query(batch, kv_head * parts.heads + first_head + h, 0);
    for_each_lanes(
        0, a.dim, [&](int64_t at, int lanes) __attribute__((always_inline)) {
          store_lanes(queries + h * padded + at, load(from + at, lanes) * scale);
        });
  }

  alignas(sizeof(Lanes)) float scores[Heads][kKeysAlone];
  const T* keys = a.key(batch, kv_head, a.oldest_seen(a.first) + first_key);
  for (int64_t key = 0; key < count; key += kTogether) {
    Lanes sums[kTogether][Heads] = {};
    for_each_lanes(
        0, a.dim, [&](int64_t at, int lanes) __attribute__((always_inline)) {
          for (int k = 0; k < kTogether; ++k) {  // the last key again behind the last
            const Lanes x = load(keys + std::min(key + k, count - 1) * a.key_strides[2] + at, lanes);
            for (int h = 0; h < Heads; ++h) sums[k][h] += load_lanes(queries + h * padded + at) * x;
          }
        });
    for (int k = 0; k < kTogether; ++k)
      for (int h = 0; h < Heads; ++h) scores[h][key + k] = sum_of(sums[k][h]);
  }

  float* out[Heads];
  for (int h = 0; h < Heads; ++h) {
    float* own = scores[h];
    const int64_t end = ceil_div(count, int64_t{kLanes}) * kLanes;
    std::fill(own + count, own + end, -std::numeric_limits<float>::infinity());
    const float largest = *std::max_element(own, own + count);
    Lanes total = {};
    for (int64_t at = 0; at < end; at += kLanes) {
      const Lanes weight = exp_of(load_lanes(own + at) - largest);
      store_lanes(own + at, weight);
      total += weight;
    }
    float* result = parts.at(kv_item, part, first_head + h);
    result[0] = largest;
    result[1] = sum_of(total);
    out[h] = result + 2;
  }

  const T* values = a.value(batch, kv_head, a.oldest_seen(a.first) + first_key);
  const auto mix = [&](int64_t at, int lanes, auto vectors) __attribute__((always_inline)) {
    Lanes sums[vectors][Heads] = {};
    for (int64_t key = 0; key < count; ++key)
      for (int v = 0; v < vectors; ++v) {
        const Lanes x = load(values + key * a.value_strides[2] + at + v * kLanes, lanes);
        for (int h = 0; h < Heads; ++h) sums[v][h] += x * scores[h][key];
      }
    for (int v = 0; v < vectors; ++v)
      for (int h = 0; h < Heads; ++h) store_lanes(out[h] + at + v * kLanes, sums[v][h]);
  };
  int64_t at = 0;
  for (; at + kTogether * kLanes <= a.dim; at += kTogether * kLanes)
    mix(at, kLanes, std::integral_constant<int, kTogether>());
  for_each_lanes(
      at, a.dim, [&](int64_t rest, int lanes) __attribute__((always_inline)) {
        mix(rest, lanes, std::integral_constant<int, 1>());
      });
}
template <typename T>
STBLLM_INLINE void attend_parts_of(const Attention<T>& a, int64_t begin, int64_t end, const Parts& parts,
                                   float* queries) {
  for (int64_t item = begin; item < end; ++item)
    for (int64_t head = 0; head < parts.heads; head += kHeadsAlone)
      switch (std::min(kHeadsAlone, parts.heads - head)) {
        case 1:
          attend_part_of<1>(a, item, head, parts, queries);
          break;
        case 2:
          attend_part_of<2>(a, item, head, parts, queries);
          break;
        case 3:
          attend_part_of<3>(a, item, head, parts, queries);
          break;
        default:
          attend_part_of<kHeadsAlone>(a, item, head, parts, queries);
          break;
      }
}
STBLLM_CLONES void attend_parts(const Attention<float>& a, int64_t begin, int64_t end, const Parts& parts,
                                float* queries) {
  attend_parts_of(a, begin, end, parts, queries);
}
STBLLM_CLONES void attend_parts(const Attention<uint16_t>& a, int64_t begin, int64_t end, const Parts& parts,
                                float* queries) {
  attend_parts_of(a, begin, end, parts, queries);
}

/// The parts of each head as one.
template <typename T>
STBLLM_INLINE void merge_parts_of(const Attention<T>& a, int64_t kv_items, const Parts& parts) {
  for (int64_t row = 0; row < kv_items * parts.heads; ++row) {
    const auto part_at = [&](int64_t part) { return parts.at(row / parts.heads, part, row % parts.heads); };
    float largest = part_at(0)[0], total = 0;
    for (int64_t part = 1; part < parts.count; ++part) largest = std::max(largest, part_at(part)[0]);
    for (int64_t part = 0; part < parts.count; ++part) {
      float* const own = part_at(part);
      own[0] = std::exp(own[0] - largest);
      total += own[0] * own[1];
    }
    for_each_lanes(
        0, a.dim, [&](int64_t at, int lanes) __attribute__((always_inline)) {
          Lanes sum = {};
          for (int64_t part = 0; part < parts.count; ++part)
            sum += load_lanes(part_at(part) + 2 + at) * part_at(part)[0];
          store(a.out + row * a.dim + at, rounded<T>(sum / total), lanes);
        });
  }
}
STBLLM_CLONES void merge_parts(const Attention<float>& a, int64_t kv_items, const Parts& parts) {
  merge_parts_of(a, kv_items, parts);
}
STBLLM_CLONES void merge_parts(const Attention<uint16_t>& a, int64_t kv_items, const Parts& parts) {
  merge_parts_of(a, kv_items, parts);
}

/// One query of each head: the keys are split, the same way whatever the number of threads, so that all of
/// these have work.
template <typename T>
void attend_alone(const Attention<T>& a, int64_t batch) {
  const int64_t kv_items = batch * a.kv_heads, heads = a.heads_per_key(), padded = a.padded_dim();
  const int64_t seen = a.first + 1 - a.oldest_seen(a.first), count = ceil_div(seen, kKeysAlone);
  thread_local Scratch results;
  Parts parts{nullptr, count, heads, padded};
  parts.memory = results.reserve(kv_items * count * heads * parts.stride());
  const int64_t products_per_item = 2 * heads * std::min(seen, kKeysAlone) * a.dim;
  at::parallel_for(0, kv_items * count, std::max<int64_t>(1, kProductsPerThread / products_per_item),
                   [&](int64_t begin, int64_t end) {
                     thread_local Scratch scratch;
                     attend_parts(a, begin, end, parts, scratch.reserve(kHeadsAlone * padded));
                   });
  merge_parts(a, kv_items, parts);
}

template <typename T>
void attention_of(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values, int64_t first,
                  int64_t window, at::Tensor& out) {
  Attention<T> a{static_cast<const T*>(queries.const_data_ptr()),
                 static_cast<const T*>(keys.const_data_ptr()),
                 static_cast<const T*>(values.const_data_ptr()),
                 static_cast<T*>(out.data_ptr()),
                 queries.size(1),
                 keys.size(1),
                 queries.size(2),
                 queries.size(3),
                 first,
                 window > 0 ? window : keys.size(2),
                 {},
                 {},
                 {}};
  for (int i = 0; i < 3; ++i) {
    a.query_strides[i] = queries.stride(i);
    a.key_strides[i] = keys.stride(i);
    a.value_strides[i] = values.stride(i);
  }
  if (a.tokens == 1) return attend_alone(a, queries.size(0));
  const int64_t items = queries.size(0) * a.kv_heads * a.query_blocks();
  const int64_t products_per_item =
      2 * a.heads_per_key() * std::min(a.tokens, kQueries) * keys.size(2) * a.dim;
  at::parallel_for(0, items, std::max<int64_t>(1, kProductsPerThread / products_per_item),
                   [&](int64_t begin, int64_t end) {
                     thread_local Scratch scratch;
                     for (int64_t item = begin; item < end; ++item) attend(a, item, scratch);
                   });
}

}  // namespace

at::Tensor causal_attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                            int64_t first, int64_t window) {
  for (const at::Tensor& tensor : {keys, values})
    STBLLM_CHECK(tensor.scalar_type() == queries.scalar_type() && tensor.stride(-1) == 1 &&
                     tensor.size(0) == queries.size(0) && tensor.size(1) == keys.size(1) &&
                     tensor.size(2) == first + queries.size(2) && tensor.size(3) == queries.size(3),
                 "{} queries at {} meet keys or values of shape [{}, {}, {}, {}]", queries.size(2), first,
                 tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3));
  STBLLM_CHECK(queries.stride(-1) == 1 && queries.size(2) > 0, "{} queries, neighbours {} apart",
               queries.size(2), queries.stride(-1));
  STBLLM_CHECK(queries.size(1) % keys.size(1) == 0, "{} heads share {}", queries.size(1), keys.size(1));
  at::Tensor out =
      at::empty({queries.size(0), queries.size(2), queries.size(1) * queries.size(3)}, queries.options());
  if (queries.scalar_type() == at::kFloat)
    attention_of<float>(queries, keys, values, first, window, out);
  else
    attention_of<uint16_t>(queries, keys, values, first, window, out);
  return out;
}

}  // namespace stbllm
