#pragma once
// Products of packed matrices with random activations, and how far those of a backend may be from the
// reference's.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/backend/activations.h"
#include "stbllm/backend/backend.h"
#include "support/element_bytes.h"
#include "support/random_matrix.h"

namespace stbllm::test {

/// Activations or results in memory of their own.
struct Buffer {
  Buffer(ElementType type, int64_t tokens, int64_t width)
      : bytes(static_cast<size_t>(tokens * width * element_bytes(type))),
        type(type),
        tokens(tokens),
        width(width) {}
  ActivationView view() { return {bytes.data(), type, tokens, width}; }
  std::vector<std::byte> bytes;
  ElementType type;
  int64_t tokens, width;
};

/// Integers of -8..8 when exact, so that every sum of products with exact matrices is exact; otherwise normal
/// with one activation in a hundred fifty times as large.
inline Buffer random_activations(ElementType type, int64_t tokens, int64_t cols, Content content,
                                 uint64_t seed) {
  Buffer x(type, tokens, cols);
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < tokens * cols; ++i) {
    const float value = content == Content::kExact ? static_cast<float>(static_cast<int>(rng() % 17) - 8)
                                                   : normal(rng) * (rng() % 100 == 0 ? 50.0f : 1.0f);
    store_element(x.view(), i, value);
  }
  return x;
}

inline Buffer run(std::string_view backend, const StructuredBinaryMatrix& matrix, Buffer& x) {
  const Backend& b = find_backend(backend);
  Buffer y(ElementType::kFloat32, x.tokens, matrix.layout().rows);
  b.matmul(*b.prepare(matrix), x.view(), y.view());
  return y;
}

inline Buffer run(std::string_view backend, const QuantizedRows& rows, Buffer& x) {
  const Backend& b = find_backend(backend);
  Buffer y(ElementType::kFloat32, x.tokens, rows.layout().rows);
  b.matmul(*b.prepare_rows(rows), x.view(), y.view());
  return y;
}

/// How far a result may be from the reference.
struct Tolerance {
  float any;    ///< of every backend and way
  float tiles;  ///< where levels are rounded to bfloat16 and activations are not

  /// Of a result that `backend` made of activations x. The tiles of AMX multiply many tokens of bfloat16.
  float of(std::string_view backend, const Buffer& x) const {
    constexpr int64_t kManyTokens = 32;  // as in kernels/cpu/cpu_backend.cc
    return backend == "cpu-amx" && x.type == ElementType::kBFloat16 && x.tokens >= kManyTokens ? tiles : any;
  }
};

/// Of every result, in their order.
inline std::vector<Tolerance> tolerances(const StructuredBinaryMatrix& matrix, Buffer& x) {
  const Layout& layout = matrix.layout();
  std::vector<Tolerance> result(static_cast<size_t>(x.tokens * layout.rows));
  std::vector<float> row(static_cast<size_t>(layout.cols));
  for (int64_t r = 0; r < layout.rows; ++r) {
    matrix.decode_row(r, row.data());
    for (int64_t t = 0; t < x.tokens; ++t) {
      float products = 0, magnitudes = 0, largest_chunk = 0, largest_weight = 0, kept = 0;
      for (int64_t first = 0; first < layout.cols; first += 128) {
        float chunk = 0;
        for (int64_t c = first; c < std::min(layout.cols, first + 128); ++c) {
          const float magnitude = std::fabs(load_element(x.view(), t * layout.cols + c)),
                      weight = std::fabs(row[c]);
          products += weight * magnitude;
          chunk += magnitude;
          largest_weight = std::max(largest_weight, weight);
          kept += weight > 0;
        }
        largest_chunk = std::max(largest_chunk, chunk);
        magnitudes += chunk;
      }
      auto& [tolerance, tiles] = result[t * layout.rows + r];
      // A float32 addition per column, each rounding a partial sum of at most sum |w||x|, and two roundings
      // of a scale. A wrong weight would show at about 2^-8.
      tolerance = static_cast<float>(layout.cols + 2) * 0x1p-24f * products;
      // Eight bits of a level, half a unit of which is lost at most. One level is exact.
      tiles = tolerance + (layout.levels > 1 ? 0x1p-9f * products : 0);
      if (x.type == ElementType::kFloat32) continue;
      // Lookups and integers round activations by at most 2^-15 of the sum of their magnitudes in 128
      // columns: errors of random sign, uniformly distributed, and 3 is five deviations. Levels as integers
      // err by at most 2^-13 of the largest.
      tolerance += 3 * std::sqrt(kept) * largest_weight * 0x1p-15f * largest_chunk;
      if (layout.levels > 1) tolerance += 0x1p-13f * largest_weight * magnitudes;
    }
  }
  return result;
}

inline std::string describe(const Layout& l) {
  return fmt::format("{}x{} {} levels {} block {} scale bits {} salient {} outliers {}", l.rows, l.cols,
                     l.nm.str(), l.levels, l.column_block, l.scale_bits, l.salient, l.outliers);
}

}  // namespace stbllm::test
