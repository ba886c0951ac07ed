// y (tokens, rows) = x (tokens, cols) W^T on the CPU, in one of four ways:
//
//  panels    for each tile of 64 rows and chunk of up to 128 columns: decode the weights once, multiply by
//  all tokens.
//            float32 activations go this way and are used as they are; others where there is neither lookup
//            nor integer product.
//  integers  the same with weights as integer levels and activations on a grid of a power of two per token
//  and chunk:
//            where there are many tokens.
//  rows      dot products with rows of integers (embedding and head), for few tokens.
//  lookups   for each chunk: tabulate what every state of a group contributes to the dot product with these
//            activations, then add up one table entry per row and group. Activations are on such a grid too,
//            fine enough that sums just fit 16 bits; the sums are exact.
//
// No result depends on the number of threads: an element of y belongs to one thread and its chunks are added
// in order.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu_matrix.h"
#include "stbllm/backend/activations.h"
#include "stbllm/backend/builtin.h"
#include "stbllm/base/cpu.h"

namespace stbllm {
namespace cpu {
namespace {

// Tokens whose tables are kept at once, and the bytes of tables that all threads share between two barriers:
// both such that tables and sums stay in the second-level cache.
constexpr int64_t kTokenBatch = 16;
constexpr int64_t kTableBudget = 512 * 1024;

// A thread is worth its start from about this many products of weight and token on.
constexpr int64_t kLookupsPerThread = 1 << 17;
constexpr int64_t kProductsPerThread = 1 << 17;

// Threads share a tile at multiples of so many tokens: whole passes of a kernel, and enough to be worth
// decoding the tile twice.
constexpr int64_t kShareTokens = 24;

int thread_count(int64_t work, int64_t work_per_thread, int64_t tiles) {
  const int64_t useful = std::min(std::max<int64_t>(work / work_per_thread, 1), tiles);
  return static_cast<int>(std::min<int64_t>(useful, omp_get_max_threads()));
}

void load_activations(const Kernels& kernels, const ActivationView& x, int64_t first, int64_t count,
                      float* to) {
  if (x.type == ElementType::kFloat32)
    std::copy_n(static_cast<const float*>(x.data) + first, count, to);
  else
    kernels.load_floats(static_cast<const uint16_t*>(x.data) + first, x.type == ElementType::kFloat16, count,
                        to);
}

void store_result(const Kernels& kernels, const float* from, int64_t count, const ActivationView& y,
                  int64_t first) {
  if (y.type == ElementType::kFloat32)
    std::copy_n(from, count, static_cast<float*>(y.data) + first);
  else
    kernels.store_floats(from, y.type == ElementType::kFloat16, count,
                         static_cast<uint16_t*>(y.data) + first);
}

/// `size` elements of scratch, which keeps what it once had.
template <typename T>
T* grow(AlignedVector<T>& scratch, int64_t size) {
  scratch.resize(std::max(static_cast<size_t>(size), scratch.size()));
  return scratch.data();
}

int64_t tile_rows(const MatrixView& m, int64_t tile) {
  return std::min<int64_t>(kTileRows, m.rows - tile * kTileRows);
}

const MatrixView& matrix_of(const Product& product) {
  return static_cast<const CpuMatrix&>(*product.matrix).view();
}

// The first of `products` whose activations, made ready, serve the last one too: itself if there is no
// earlier one.
template <typename T, typename Share>
size_t find_maker(const std::vector<T>& products, const Share& share) {
  return std::ranges::find_if(products, [&](const T& other) { return share(other.m, products.back().m); }) -
         products.begin();
}

bool same_outliers(const MatrixView& a, const MatrixView& b) {
  return std::equal(a.outlier_columns, a.outlier_columns + a.outliers, b.outlier_columns,
                    b.outlier_columns + b.outliers);
}

// What a thread multiplies: tiles times tokens are dealt out in equal shares, so that nobody waits. Where two
// threads share a tile, both decode it. Calls visit(tile, first token, last token).
template <typename Visit>
void for_each_share(int64_t tiles, int64_t tokens, const Visit& visit) {
  const int64_t parts = ceil_div(tokens, kShareTokens), all = tiles * parts;
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(),
                last = all * (thread + 1) / threads;
  for (int64_t at = all * thread / threads, next; at < last; at = next) {
    const int64_t tile = at / parts;
    next = std::min(last, (tile + 1) * parts);
    visit(tile, at % parts * kShareTokens, std::min(tokens, (next - tile * parts) * kShareTokens));
  }
}

// --- panels ---

void multiply_panels(const Kernels& kernels, const MatrixView& m, const ActivationView& x,
                     const ActivationView& y) {
  const int64_t tokens = x.tokens, width = m.chunk_columns;
  // Activations as (chunks, tokens, width): what one panel needs lies together.
  thread_local AlignedVector<float> scratch;
  float* floats = grow(scratch, m.chunks * tokens * width);

#pragma omp parallel num_threads( \
    thread_count(tokens* m.rows* m.cols, kProductsPerThread, m.tiles* ceil_div(tokens, kShareTokens)))
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; ++token)
      for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
        const int64_t first = chunk * width, count = std::min(width, m.cols - first);
        float* to = floats + (chunk * tokens + token) * width;
        load_activations(kernels, x, token * m.cols + first, count, to);
        std::fill_n(to + count, width - count, 0.0f);
      }

    AlignedVector<float> panel(static_cast<size_t>(width * kTileRows)),
        sums(static_cast<size_t>(tokens * kTileRows));
    for_each_share(m.tiles, tokens, [&](int64_t tile, int64_t first, int64_t last) {
      std::fill_n(sums.data(), (last - first) * kTileRows, 0.0f);
      for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
        kernels.decode(m, tile, chunk, panel.data());
        kernels.multiply(panel.data(), width, floats + (chunk * tokens + first) * width, last - first,
                         sums.data(), kTileRows);
      }
      for (int64_t token = first; token < last; ++token)
        store_result(kernels, &sums[(token - first) * kTileRows], tile_rows(m, tile), y,
                     token * m.rows + tile * kTileRows);
    });
  }
}

// --- rows of integers, few tokens ---

void multiply_rows(const Kernels& kernels, const MatrixView& m, const ActivationView& x,
                   const ActivationView& y) {
  const int64_t width = m.chunks * m.chunk_columns;
  thread_local AlignedVector<float> scratch;
  float* arranged = grow(scratch, x.tokens * (width + m.cols));
  float* values = arranged + x.tokens * width;
  load_activations(kernels, x, 0, x.tokens * m.cols, values);
  std::fill_n(arranged, x.tokens * width, 0.0f);
  for (int64_t t = 0; t < x.tokens; ++t)
    for (int64_t c = 0; c < m.cols; ++c) {
      const int64_t first =
          c / m.chunk_columns * m.chunk_columns;  // in which column c stands at c % 4 * 16 + c / 4
      arranged[t * width + first + c % 4 * (m.chunk_columns / 4) + (c - first) / 4] = values[t * m.cols + c];
    }

#pragma omp parallel for schedule(static) \
    num_threads(thread_count(x.tokens* m.rows* m.cols, kProductsPerThread, m.tiles))
  for (int64_t tile = 0; tile < m.tiles; ++tile) {
    float sums[kFewTokens * kTileRows];
    kernels.multiply_rows(m, tile, arranged, x.tokens, sums);
    for (int64_t t = 0; t < x.tokens; ++t)
      store_result(kernels, sums + t * kTileRows, tile_rows(m, tile), y, t * m.rows + tile * kTileRows);
  }
}

// --- integers and lookups ---

// The activations of one token's chunk, without outlier columns and with zeros after the last column.
void load_chunk(const Kernels& kernels, const MatrixView& m, const ActivationView& x, int64_t token,
                int64_t chunk, float* to) {
  const int64_t first = chunk * m.chunk_columns, count = std::min(m.chunk_columns, m.cols - first);
  load_activations(kernels, x, token * m.cols + first, count, to);
  std::fill(to + count, to + m.chunk_columns, 0.0f);
  const int32_t* end = m.outlier_columns + m.outliers;
  for (const int32_t* col = std::lower_bound(m.outlier_columns, end, first);
       col != end && *col < first + count; ++col)
    to[*col - first] = 0.0f;
}

// Adds the outlier columns, which integers and tables leave out.
void add_outliers(const Kernels& kernels, const MatrixView& m, int64_t tile, const ActivationView& x,
                  int64_t first_token, int64_t tokens, float* sums, int64_t stride) {
  if (m.outliers == 0) return;
  thread_local AlignedVector<float> scratch;
  float* panel = grow(scratch, m.outliers * (kTileRows + tokens));
  float* values = panel + m.outliers * kTileRows;
  kernels.decode_outliers(m, tile, panel);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < m.outliers; ++i)
      values[t * m.outliers + i] = load_element(x, (first_token + t) * m.cols + m.outlier_columns[i]);
  kernels.multiply(panel, m.outliers, values, tokens, sums, stride);
}

// A matrix among those that are multiplied together, and the activations it shares with others.
struct IntegerProduct {
  const MatrixView& m;
  const ActivationView& y;
  int64_t first_tile;  // of all matrices in a row
  size_t maker = 0;    // whose integers serve this one
  // (chunks, tokens, chunk_columns) and (chunks, tokens): what one panel needs lies together.
  int16_t* integers = nullptr;
  float* steps = nullptr;
};

// Whether two matrices take the same activations as the same integers: those with as wide sums and the same
// outlier columns.
bool share_integers(const MatrixView& a, const MatrixView& b) {
  return a.chunk_columns == b.chunk_columns && (a.levels > 1) == (b.levels > 1) && same_outliers(a, b);
}

void multiply_integers(const Kernels& kernels, std::span<const Product> products, const ActivationView& x) {
  const int64_t tokens = x.tokens;
  std::vector<IntegerProduct> all;
  int64_t tiles = 0, rows = 0, integer_count = 0, step_count = 0;
  for (const Product& product : products) {
    const MatrixView& m = matrix_of(product);
    all.push_back({m, product.y, tiles});
    all.back().maker = find_maker(all, share_integers);
    tiles += m.tiles;
    rows += m.rows;
    if (all.back().maker + 1 != all.size()) continue;
    integer_count += tokens * m.chunks * m.chunk_columns;
    step_count += tokens * m.chunks;
  }
  thread_local AlignedVector<int16_t> integer_scratch;
  thread_local AlignedVector<float> step_scratch;
  int16_t* integers = grow(integer_scratch, integer_count);
  float* steps = grow(step_scratch, step_count);
  for (size_t i = 0; i < all.size(); ++i) {
    IntegerProduct& own = all[i];
    const int64_t own_steps = own.maker == i ? tokens * own.m.chunks : 0;
    own.integers = own.maker == i ? integers : all[own.maker].integers;
    own.steps = own.maker == i ? steps : all[own.maker].steps;
    integers += own_steps * own.m.chunk_columns;
    steps += own_steps;
  }

#pragma omp parallel num_threads( \
    thread_count(tokens* rows* x.width, kProductsPerThread, tiles* ceil_div(tokens, kShareTokens)))
  {
    for (size_t i = 0; i < all.size(); ++i) {
      const IntegerProduct& own = all[i];
      if (own.maker != i) continue;
#pragma omp for schedule(static) nowait
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t chunk = 0; chunk < own.m.chunks; ++chunk) {
          alignas(64) float values[kChunkColumns];
          load_chunk(kernels, own.m, x, token, chunk, values);
          kernels.to_integers(own.m, values, own.integers + (chunk * tokens + token) * own.m.chunk_columns,
                              own.steps + chunk * tokens + token);
        }
    }
#pragma omp barrier

    AlignedVector<int16_t> panel(kChunkColumns * kTileRows);
    AlignedVector<float> scales(kTileRows), sums(static_cast<size_t>(tokens * kTileRows));
    for_each_share(tiles, tokens, [&](int64_t at, int64_t first, int64_t last) {
      const IntegerProduct& own = *std::find_if(
          all.rbegin(), all.rend(), [&](const IntegerProduct& each) { return each.first_tile <= at; });
      const MatrixView& m = own.m;
      const int64_t tile = at - own.first_tile, count = last - first;
      std::fill_n(sums.data(), count * kTileRows, 0.0f);
      for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
        kernels.decode_integers(m, tile, chunk, panel.data(), scales.data());
        kernels.multiply_integers(panel.data(), scales.data(), m.chunk_columns,
                                  own.integers + (chunk * tokens + first) * m.chunk_columns,
                                  own.steps + chunk * tokens + first, count, sums.data(), kTileRows);
      }
      add_outliers(kernels, m, tile, x, first, count, sums.data(), kTileRows);
      for (int64_t t = 0; t < count; ++t)
        store_result(kernels, &sums[t * kTileRows], tile_rows(m, tile), own.y,
                     (first + t) * m.rows + tile * kTileRows);
    });
  }
}

// The row scales, which look_up() leaves out.
void scale_rows(const MatrixView& m, int64_t tile, int64_t tokens, float* sums, int64_t stride) {
  if (m.row_scales == nullptr) return;
  const float level = m.levels == 1 ? m.level[0] : 1.0f;
  for (int64_t t = 0; t < tokens; ++t)
    for (int r = 0; r < kTileRows; ++r) sums[t * stride + r] *= m.row_scales[tile * kTileRows + r] * level;
}

// A matrix among those that are multiplied together, and its part of what they share.
struct Lookup {
  const MatrixView& m;
  const ActivationView& y;
  int64_t first_byte;  // of a chunk's codes of all matrices in a row
  int64_t padded_rows;
  size_t maker = 0;  // whose tables serve this one
  uint8_t* tables = nullptr;
  float* steps = nullptr;
  float* sums = nullptr;

  int64_t chunk_table_bytes() const { return kChunkColumns / m.group * m.table_bytes; }
};

// Whether two matrices have the same tables, given the same activations: those of one code with one level
// (several are part of the tables) and of the same outlier columns (which are left out). A matrix shares with
// itself.
bool share_tables(const MatrixView& a, const MatrixView& b) {
  if (&a == &b) return true;
  return a.levels == 1 && b.levels == 1 && a.file_keep == b.file_keep && a.file_group == b.file_group &&
         same_outliers(a, b);
}

// The thread's tiles of a matrix: those of all matrices are dealt out by the bytes of their codes, in whole
// strips.
struct TileRange {
  int64_t first, last;
  TileRange(const Lookup& lookup, int64_t all_bytes) {
    const auto tiles_before = [&](int64_t thread) {
      const int64_t bytes = all_bytes * thread / omp_get_num_threads() - lookup.first_byte;
      const int64_t tile = std::clamp<int64_t>(bytes / lookup.m.chunk_bytes, 0, lookup.m.tiles);
      return tile == lookup.m.tiles ? tile : tile - tile % lookup.m.strip_tiles;
    };
    first = tiles_before(omp_get_thread_num());
    last = tiles_before(omp_get_thread_num() + 1);
  }
};

void multiply_lookups(const Kernels& kernels, std::span<const Product> products, const ActivationView& x) {
  const int64_t batch = std::min(kTokenBatch, x.tokens);
  std::vector<Lookup> lookups;
  int64_t tiles = 0, code_bytes = 0, rows = 0, padded_rows = 0, table_bytes = 0;
  for (const Product& product : products) {
    const MatrixView& m = matrix_of(product);
    lookups.push_back({m, product.y, code_bytes, m.tiles * kTileRows});
    Lookup& lookup = lookups.back();
    lookup.maker = find_maker(lookups, share_tables);
    tiles += m.tiles;
    code_bytes += m.tiles * m.chunk_bytes;
    rows += m.rows;
    padded_rows += lookup.padded_rows;
    if (lookup.maker + 1 == lookups.size()) table_bytes += lookup.chunk_table_bytes();
  }
  const int64_t cols = lookups[0].m.cols, all_chunks = lookups[0].m.chunks;
  const int64_t panel_chunks = std::clamp<int64_t>(kTableBudget / (batch * table_bytes), 1, all_chunks);
  thread_local AlignedVector<uint8_t> table_scratch;
  thread_local AlignedVector<float> sum_scratch, step_scratch;
  uint8_t* tables = grow(table_scratch, panel_chunks * batch * table_bytes);
  float* steps = grow(step_scratch, panel_chunks * batch * std::ssize(lookups));
  float* sums = grow(sum_scratch, batch * padded_rows);
  for (size_t i = 0; i < lookups.size(); ++i) {
    Lookup& lookup = lookups[i];
    lookup.sums = sums;
    sums += batch * lookup.padded_rows;
    const int64_t own_steps = lookup.maker == i ? panel_chunks * batch : 0;
    lookup.tables = lookup.maker == i ? tables : lookups[lookup.maker].tables;
    lookup.steps = lookup.maker == i ? steps : lookups[lookup.maker].steps;
    tables += own_steps * lookup.chunk_table_bytes();
    steps += own_steps;
  }

#pragma omp parallel num_threads(thread_count(x.tokens* rows* cols, kLookupsPerThread, tiles))
  for (int64_t first = 0; first < x.tokens; first += batch) {
    const int64_t tokens = std::min(batch, x.tokens - first);
    for (const Lookup& lookup : lookups) {
      const TileRange own(lookup, code_bytes);
      for (int64_t t = 0; t < tokens; ++t)
        std::fill(lookup.sums + t * lookup.padded_rows + own.first * kTileRows,
                  lookup.sums + t * lookup.padded_rows + own.last * kTileRows, 0.0f);
    }

    for (int64_t panel = 0; panel < all_chunks; panel += panel_chunks) {
      const int64_t chunks = std::min(panel_chunks, all_chunks - panel);
      for (size_t own = 0; own < lookups.size(); ++own) {
        const Lookup& lookup = lookups[own];
        if (lookup.maker != own) continue;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < chunks * tokens; ++i) {
          alignas(64) float values[kChunkColumns];
          load_chunk(kernels, lookup.m, x, first + i % tokens, panel + i / tokens, values);
          kernels.tabulate(lookup.m, values, lookup.tables + i * lookup.chunk_table_bytes(),
                           lookup.steps + i);
        }
      }
#pragma omp barrier
      for (const Lookup& lookup : lookups) {
        const TileRange own(lookup, code_bytes);
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          kernels.look_up(lookup.m, panel + chunk, own.first, own.last,
                          lookup.tables + chunk * tokens * lookup.chunk_table_bytes(),
                          lookup.steps + chunk * tokens, tokens, lookup.sums, lookup.padded_rows);
      }
      const bool tables_serve_again = panel + panel_chunks < all_chunks || first + batch < x.tokens;
      if (tables_serve_again) {
#pragma omp barrier
      }
    }

    for (const Lookup& lookup : lookups) {
      const TileRange own(lookup, code_bytes);
      for (int64_t tile = own.first; tile < own.last; ++tile) {
        float* tile_sums = lookup.sums + tile * kTileRows;
        scale_rows(lookup.m, tile, tokens, tile_sums, lookup.padded_rows);
        add_outliers(kernels, lookup.m, tile, x, first, tokens, tile_sums, lookup.padded_rows);
        for (int64_t t = 0; t < tokens; ++t)
          store_result(kernels, tile_sums + t * lookup.padded_rows, tile_rows(lookup.m, tile), lookup.y,
                       (first + t) * lookup.m.rows + tile * kTileRows);
      }
    }
  }
}

enum class Way { kPanels, kRows, kIntegers, kLookups };

/// From so many tokens on, the decoding of a weight is shared by enough of them.
constexpr int64_t kManyTokens = 32;

Way way_of(const Kernels& kernels, const MatrixView& m, const ActivationView& x) {
  const bool integers = kernels.multiply_integers != nullptr;
  if (m.form == CodeForm::kRows && x.tokens <= kFewTokens) return Way::kRows;
  if (m.form == CodeForm::kPlane || x.type == ElementType::kFloat32) return Way::kPanels;
  if (m.form == CodeForm::kRows) return integers ? Way::kIntegers : Way::kPanels;
  if (x.tokens < kManyTokens) return Way::kLookups;
  if (integers && !permutes_fast()) return Way::kIntegers;
  // Few rows make a table that costs more than looking things up in it. The two met at 6 to 30 rows per
  // entry, as codes and processors were (stbllm-bench --models smollm2 --tokens 512).
  constexpr int64_t kRowsPerEntry = 16;
  if (m.rows >= kRowsPerEntry * m.entries) return Way::kLookups;
  return integers ? Way::kIntegers : Way::kPanels;
}

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const Kernels& kernels) : kernels_(kernels) {}
  std::string_view name() const override { return kernels_.name; }

  std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const override {
    return std::make_unique<CpuMatrix>(matrix, kernels_);
  }
  std::unique_ptr<PreparedMatrix> prepare_rows(const QuantizedRows& rows) const override {
    return std::make_unique<CpuMatrix>(rows, kernels_);
  }

  void matmul(const PreparedMatrix& prepared, const ActivationView& x, const ActivationView& y,
              void*) const override {
    const Product product{&prepared, y};
    matmul_all({&product, 1}, x);
  }

  void matmul_all(std::span<const Product> products, const ActivationView& x,
                  void* = nullptr) const override {
    std::vector<Product> looked_up, as_integers;
    for (const Product& product : products) {
      const auto& matrix = dynamic_cast<const CpuMatrix&>(*product.matrix);
      STBLLM_CHECK(&matrix.kernels() == &kernels_, "a matrix prepared by {} was given to {}",
                   matrix.kernels().name, kernels_.name);
      const MatrixView& m = matrix.view();
      check_activations(m.rows, m.cols, x, product.y);
      switch (way_of(kernels_, m, x)) {
        case Way::kPanels:
          multiply_panels(kernels_, m, x, product.y);
          break;
        case Way::kRows:
          multiply_rows(kernels_, m, x, product.y);
          break;
        case Way::kIntegers:
          as_integers.push_back(product);
          break;
        case Way::kLookups:
          looked_up.push_back(product);
          break;
      }
    }
    if (!as_integers.empty()) multiply_integers(kernels_, as_integers, x);
    if (!looked_up.empty()) multiply_lookups(kernels_, looked_up, x);
  }

 private:
  const Kernels& kernels_;
};

}  // namespace
}  // namespace cpu

const Backend& cpu_backend(CpuIsa isa) {
  static const cpu::CpuBackend generic(cpu::kGenericKernels), avx2(cpu::kAvx2Kernels),
      avx512(cpu::kAvx512Kernels);
  switch (isa) {
    case CpuIsa::kGeneric:
      return generic;
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx512;
  }
  return generic;
}

std::string_view missing_cpu_feature(CpuIsa isa) {
#define STBLLM_NEED(feature) \
  if (!__builtin_cpu_supports(feature)) return feature
  if (isa >= CpuIsa::kAvx2) {
    STBLLM_NEED("avx2");
    STBLLM_NEED("fma");
    STBLLM_NEED("f16c");
  }
  if (isa >= CpuIsa::kAvx512) {
    STBLLM_NEED("avx512f");
    STBLLM_NEED("avx512bw");
    STBLLM_NEED("avx512vl");
    STBLLM_NEED("avx512dq");
    STBLLM_NEED("avx512vbmi");
    STBLLM_NEED("avx512vbmi2");
    STBLLM_NEED("avx512vnni");
  }
#undef STBLLM_NEED
  return {};
}

}  // namespace stbllm
