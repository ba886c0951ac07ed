// What attention hands back to queries, keys and values. With P = softmax(s Q K^T) over the keys that each
// query sees and the gradient G of the outputs:
//
//   V' = P^T G      Q' = s D K      K' = s D^T Q      D = P * (G V^T - rowsum(P * G V^T))
//
// P is computed again. Neighbouring queries of all heads that share keys make one chunk, whose rows of scores
// are the only ones in memory, over the keys that one of them sees: five products of libtorch and two passes
// over the scores for a chunk, and no product of a few rows.

#include "attention_gradient.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "elements.h"
#include "stbllm/base/bits.h"

namespace stbllm {
namespace {

/// Queries of a head in a chunk: products of enough rows, and few keys that only the last of them sees.
constexpr int64_t kChunkQueries = 128;
/// The score of what no query sees: its exponential is 0.
constexpr float kUnseen = -std::numeric_limits<float>::infinity();

/// Rows of scores, `keys` each: of one query, neighbouring queries after each other, then heads and
/// sequences.
template <typename T>
struct ScoreRows {
  float* scores;   // s Q K^T; overwritten
  T* probability;  // becomes P
  T* gradient;     // G V^T; becomes s D
  int64_t keys, queries;
  int64_t first_query, first_key;  // positions
  int64_t window;                  // keys that a query sees at most
  float scale;
};
template <typename Lanes, typename T>
STBLLM_INLINE void differentiate_rows_of(const ScoreRows<T>& rows, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t position = rows.first_query + row % rows.queries,
                  oldest = std::max<int64_t>(0, position + 1 - rows.window - rows.first_key),
                  newest = position + 1 - rows.first_key;  // keys from oldest to in front of newest are seen
    float* scores = rows.scores + row * rows.keys;
    T *probability = rows.probability + row * rows.keys, *gradient = rows.gradient + row * rows.keys;
    Lanes highest = Lanes{} + scores[oldest];
    for_each_lanes(oldest, newest, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes x = load_or<Lanes>(scores + at, count, scores[oldest]);
      highest = select(x > highest, x, highest);
    });
    const float largest = largest_of(highest);
    Lanes total = {}, shared = {};
    for_each_lanes(oldest, newest, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes share = exp_of(load_or<Lanes>(scores + at, count, kUnseen) - largest);
      store_lanes(scores + at, share, count);
      total += share;
      shared += share * load<Lanes>(gradient + at, count);
    });
    const float inverse = 1 / sum_of(total), mean = sum_of(shared) * inverse;
    for_each_lanes(oldest, newest, [&](int64_t at, int count) STBLLM_INLINED {
      const Lanes p = load_lanes<Lanes>(scores + at, count) * inverse;
      store(probability + at, rounded<T>(p), count);
      store(gradient + at, rounded<T>(p * (load<Lanes>(gradient + at, count) - mean) * rows.scale), count);
    });
    for (T* unseen : {probability, gradient}) {
      std::fill(unseen, unseen + oldest, T{});
      std::fill(unseen + newest, unseen + rows.keys, T{});
    }
  }
}
template <typename T>
void differentiate_rows(const ScoreRows<T>& rows, int64_t begin, int64_t end) {
  with_lanes([&]<typename Lanes>() STBLLM_INLINED { differentiate_rows_of<Lanes>(rows, begin, end); });
}

template <typename T>
void differentiate(const at::Tensor& scores, const at::Tensor& probability, const at::Tensor& gradient,
                   ScoreRows<T> rows) {
  rows.scores = scores.data_ptr<float>();
  rows.probability = static_cast<T*>(probability.data_ptr());
  rows.gradient = static_cast<T*>(gradient.data_ptr());
  const int64_t count = scores.numel() / rows.keys;
  at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) { differentiate_rows(rows, begin, end); });
}

}  // namespace

AttentionGradients attention_gradients(const at::Tensor& queries, const at::Tensor& keys,
                                       const at::Tensor& values, int64_t window,
                                       const at::Tensor& out_gradient) {
  const int64_t batch = queries.size(0), heads = queries.size(1), tokens = queries.size(2),
                dim = queries.size(3), kv_heads = keys.size(1), group = heads / kv_heads,
                sets = batch * kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  const int64_t seen = window > 0 ? window : tokens;
  const at::ScalarType type = queries.scalar_type();
  const auto by_set = [&](const at::Tensor& x) { return x.reshape({sets, tokens, dim}); };
  const at::Tensor k = by_set(keys), v = by_set(values), wide_k = k.to(at::kFloat);
  // (batch, kv_heads, group, tokens, dim), as views.
  const auto by_group = [&](const at::Tensor& x) { return x.unflatten(1, {kv_heads, group}); };
  const at::Tensor q = by_group(queries),
                   g = by_group(out_gradient.view({batch, tokens, heads, dim}).transpose(1, 2));
  AttentionGradients result;
  // In the order in memory that a projection leaves.
  result.queries = at::empty({batch, tokens, heads, dim}, queries.options()).transpose(1, 2);
  const at::Tensor of_q = by_group(result.queries),
                   of_k = at::zeros({sets, tokens, dim}, k.options().dtype(at::kFloat)),
                   of_v = at::zeros_like(of_k);
  for (int64_t first = 0; first < tokens; first += kChunkQueries) {
    const int64_t end = std::min(tokens, first + kChunkQueries), count = end - first;
    const int64_t first_key = std::max<int64_t>(0, first + 1 - seen);
    const auto chunk = [&](const at::Tensor& x) {
      return x.slice(3, first, end).reshape({sets, group * count, dim});
    };
    const auto seen_keys = [&](const at::Tensor& x) { return x.slice(1, first_key, end); };
    const at::Tensor q_rows = chunk(q), g_rows = chunk(g);
    const at::Tensor scores =
        at::bmm(q_rows.to(at::kFloat) * scale, seen_keys(wide_k).transpose(1, 2)).contiguous();
    const at::Tensor gradient = at::bmm(g_rows, seen_keys(v).transpose(1, 2)).contiguous();
    const at::Tensor probability = at::empty_like(gradient);
    const int64_t key_count = end - first_key;
    if (type == at::kFloat)
      differentiate<float>(scores, probability, gradient,
                           {nullptr, nullptr, nullptr, key_count, count, first, first_key, seen, scale});
    else
      differentiate<uint16_t>(scores, probability, gradient,
                              {nullptr, nullptr, nullptr, key_count, count, first, first_key, seen, scale});
    seen_keys(of_v).add_(at::bmm(probability.transpose(1, 2), g_rows));
    seen_keys(of_k).add_(at::bmm(gradient.transpose(1, 2), q_rows));
    of_q.slice(3, first, end)
        .copy_(at::bmm(gradient, seen_keys(k)).view({batch, kv_heads, group, count, dim}));
  }
  const auto by_head = [&](const at::Tensor& x) { return x.view({batch, kv_heads, tokens, dim}).to(type); };
  result.keys = by_head(of_k);
  result.values = by_head(of_v);
  return result;
}

}  // namespace stbllm
