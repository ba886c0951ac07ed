// y (tokens, rows) = x (tokens, cols) W^T on the CPU, in one of four ways:
//
//   panels    For each tile of 64 rows and chunk of up to 128 columns, the weights are decoded once and
//             multiplied by all tokens. float32 activations go this way and are used as they are; so do
//             others where there is neither lookup nor product of 16-bit numbers.
//   words     The same in 16 bits, for many tokens: weights as integer levels and activations as multiples
//             of a power of two per token and chunk, or both in bfloat16 where the processor has tiles for
//             them.
//   rows      Dot products with rows of integers (embedding and head), for few tokens.
//   lookups   For each chunk, a table holds what every state of a group contributes to the dot product with
//             these activations; then every row adds up one table entry per group. Activations are
//             multiples of a power of two here too, fine enough that sums just fit 16 bits; the sums are
//             exact.
//
// No result depends on the number of threads: an element of y belongs to one thread and its chunks are added
// in order.
//
// Threads meet at barriers inside a region, so nothing in a region may throw: all memory is taken before it.

#include <algorithm>
#include <array>
#include <span>
#include <utility>
#include <vector>

#include "cpu_matrix.h"
#include "stbllm/backend/activations.h"
#include "stbllm/backend/builtin.h"
#include "stbllm/base/cpu.h"
#include "stbllm/base/parallel.h"

namespace stbllm {
namespace cpu {
namespace {

// Tokens whose tables are kept at once, and the bytes of tables that all threads share between two barriers.
// Both are such that tables and sums stay in the second-level cache.
constexpr int64_t kTokenBatch = 16;
constexpr int64_t kTableBudget = 512 * 1024;

// A thread is worth its start from about this many products of weight and token on.
constexpr int64_t kProductsPerThread = 1 << 17;

// Where panels are multiplied, threads share a tile at multiples of so many tokens.
constexpr int64_t kShareTokens = 24;

// Panels of 16 bits: tiles whose products with one chunk of activations come one after the other, and the
// tokens of a turn. The chunk (128 KiB) and the sums (512 KiB) then stay in the second-level cache.
constexpr int64_t kTurnTiles = 4;
constexpr int64_t kTurnTokens = 512;

// How many threads `products` (weights times tokens) in `parts` parts are worth.
int64_t useful_threads(int64_t products, int64_t parts) {
  const int64_t useful = std::min(std::max<int64_t>(products / kProductsPerThread, 1), parts);
  return std::min(useful, runnable_threads());
}

void load_activations(const Kernels& kernels, const ActivationView& x, int64_t first, int64_t count,
                      float* to) {
  if (x.type == ElementType::kFloat32)
    std::copy_n(static_cast<const float*>(x.data) + first, count, to);
  else
    kernels.load_floats(static_cast<const uint16_t*>(x.data) + first, x.type == ElementType::kFloat16, count,
                        to);
}

/// `size` elements of scratch, which keeps what it once had.
template <typename T>
T* grow(AlignedVector<T>& scratch, int64_t size) {
  scratch.resize(std::max(static_cast<size_t>(size), scratch.size()));
  return scratch.data();
}

// Floats of a buffer, rounded up so that the next buffer begins at a whole 512-bit register too.
constexpr int64_t whole_registers(int64_t floats) { return ceil_div(floats, 16) * 16; }

const MatrixView& matrix_of(const Product& product) {
  return static_cast<const CpuMatrix&>(*product.matrix).view();
}

// The index of the first of `products` whose activations, made ready, serve the last one too: that of the
// last one itself if there is no earlier one.
template <typename T, typename Share>
size_t find_maker(const std::vector<T>& products, const Share& share) {
  return std::ranges::find_if(products, [&](const T& other) { return share(other.m, products.back().m); }) -
         products.begin();
}

// The columns apart, which lookups and panels of 16 bits leave out and which are added as float32 products:
// outliers, whose weights are their own, and salient columns, whose scales are.
std::array<std::span<const int32_t>, 2> columns_apart(const MatrixView& m) {
  return {std::span(m.outlier_columns, static_cast<size_t>(m.outliers)),
          std::span(m.salient_columns, static_cast<size_t>(m.salient))};
}

bool same_columns_apart(const MatrixView& a, const MatrixView& b) {
  return std::ranges::equal(columns_apart(a), columns_apart(b), std::ranges::equal);
}

// Some tiles and tokens that a thread multiplies.
struct Share {
  int64_t tile, tiles, first_token, last_token;
};

// Calls visit(share) for what a thread multiplies: tiles times tokens are dealt out in equal shares, so that
// nobody waits. Threads share a tile at multiples of `step` tokens, which are whole passes of a kernel and
// enough of them to be worth decoding the tile twice. Whole tiles come up to most_tiles at a time.
template <typename Visit>
void for_each_share(const ThreadPlace& place, int64_t tiles, int64_t tokens, int64_t step, int64_t most_tiles,
                    const Visit& visit) {
  const int64_t parts = ceil_div(tokens, step), last = place.end(tiles * parts);
  for (int64_t at = place.begin(tiles * parts), next; at < last; at = next) {
    const int64_t whole = at % parts == 0 ? std::min((last - at) / parts, most_tiles) : 0, tile = at / parts;
    next = whole > 0 ? at + whole * parts : std::min(last, (tile + 1) * parts);
    visit(Share{.tile = tile,
                .tiles = std::max<int64_t>(whole, 1),
                .first_token = at % parts * step,
                .last_token = whole > 0 ? tokens : std::min(tokens, (next - tile * parts) * step)});
  }
}

// The products of a tile with some tokens: those of token `first_token` + t are sums[t * stride + 0 .. 63].
struct TileSums {
  const MatrixView& m;
  int64_t tile, first_token, tokens;
  float* sums;
  int64_t stride;
};

void store_tile(const Kernels& kernels, const TileSums& from, const ActivationView& y) {
  const int64_t first_row = from.tile * kTileRows,
                rows = std::min<int64_t>(kTileRows, from.m.rows - first_row);
  for (int64_t t = 0; t < from.tokens; ++t) {
    const float* sums = from.sums + t * from.stride;
    const int64_t to = (from.first_token + t) * from.m.rows + first_row;
    if (y.type == ElementType::kFloat32)
      std::copy_n(sums, rows, static_cast<float*>(y.data) + to);
    else
      kernels.store_floats(sums, y.type == ElementType::kFloat16, rows, static_cast<uint16_t*>(y.data) + to);
  }
}

// --- panels ---

// Writes activations as (chunks, tokens, chunk_columns): what one panel needs lies together.
void arrange_chunks(const Kernels& kernels, const MatrixView& m, const ActivationView& x, int64_t token,
                    float* arranged) {
  const int64_t width = m.chunk_columns;
  for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
    const int64_t first = chunk * width, count = std::min(width, m.cols - first);
    float* to = arranged + (chunk * x.tokens + token) * width;
    load_activations(kernels, x, token * m.cols + first, count, to);
    std::fill_n(to + count, width - count, 0.0f);
  }
}

void multiply_panels(const Kernels& kernels, const MatrixView& m, const ActivationView& x,
                     const ActivationView& y) {
  const int64_t tokens = x.tokens, width = m.chunk_columns;
  const int64_t useful = useful_threads(tokens * m.rows * m.cols, m.tiles * ceil_div(tokens, kShareTokens));
  const int64_t panel_floats = width * kTileRows, thread_floats = panel_floats + tokens * kTileRows;
  thread_local AlignedVector<float> scratch;
  float* const buffers = grow(scratch, useful * thread_floats + m.chunks * tokens * width);
  float* const arranged = buffers + useful * thread_floats;

#pragma omp parallel num_threads(team_size(useful))
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tokens; ++token) arrange_chunks(kernels, m, x, token, arranged);

    const ThreadPlace place = ThreadPlace::among(useful);
    float* const panel = buffers + place.thread * thread_floats;
    float* const sums = panel + panel_floats;
    for_each_share(place, m.tiles, tokens, kShareTokens, 1, [&](const Share& share) {
      const auto& [tile, tiles, first, last] = share;
      std::fill_n(sums, (last - first) * kTileRows, 0.0f);
      for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
        kernels.decode(m, tile, chunk, panel);
        kernels.multiply(panel, width, arranged + (chunk * tokens + first) * width, last - first, sums,
                         kTileRows);
      }
      store_tile(kernels,
                 {.m = m,
                  .tile = tile,
                  .first_token = first,
                  .tokens = last - first,
                  .sums = sums,
                  .stride = kTileRows},
                 y);
    });
  }
}

// --- rows of integers, few tokens ---

void multiply_rows(const Kernels& kernels, const MatrixView& m, const ActivationView& x,
                   const ActivationView& y) {
  const int64_t width = m.chunks * m.chunk_columns;
  thread_local AlignedVector<float> scratch;
  float* const arranged = grow(scratch, x.tokens * (width + m.cols));
  float* const values = arranged + x.tokens * width;
  load_activations(kernels, x, 0, x.tokens * m.cols, values);
  std::fill_n(arranged, x.tokens * width, 0.0f);
  for (int64_t t = 0; t < x.tokens; ++t)
    for (int64_t col = 0; col < m.cols; ++col) {
      const int64_t c = col % m.chunk_columns;  // it stands at c % 4 * 16 + c / 4 of its chunk
      arranged[t * width + col - c + c % 4 * (m.chunk_columns / 4) + c / 4] = values[t * m.cols + col];
    }

  const int64_t useful = useful_threads(x.tokens * m.rows * m.cols, m.tiles);
  parallel_for(m.tiles, ceil_div(m.tiles, useful), [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      float sums[kFewTokens * kTileRows];
      kernels.multiply_rows(m, tile, arranged, x.tokens, sums);
      store_tile(
          kernels,
          {.m = m, .tile = tile, .first_token = 0, .tokens = x.tokens, .sums = sums, .stride = kTileRows}, y);
    }
  });
}

// --- panels of 16 bits and lookups ---

// Loads the activations of one token's chunk, with zeros at columns apart and after the last column.
void load_chunk(const Kernels& kernels, const MatrixView& m, const ActivationView& x, int64_t token,
                int64_t chunk, float* to) {
  const int64_t first = chunk * m.chunk_columns, count = std::min(m.chunk_columns, m.cols - first);
  load_activations(kernels, x, token * m.cols + first, count, to);
  std::fill(to + count, to + m.chunk_columns, 0.0f);
  for (const std::span<const int32_t> columns : columns_apart(m))
    for (auto col = std::ranges::lower_bound(columns, first); col != columns.end() && *col < first + count;
         ++col)
      to[*col - first] = 0.0f;
}

// What add_columns_apart() needs of scratch.
int64_t apart_floats(const MatrixView& m, int64_t tokens) {
  return whole_registers((m.outliers + m.salient) * (kTileRows + tokens));
}

void add_columns_apart(const Kernels& kernels, const TileSums& to, const ActivationView& x, float* scratch) {
  const MatrixView& m = to.m;
  const int64_t apart = m.outliers + m.salient;
  if (apart == 0) return;
  float *const values = scratch + apart * kTileRows, *value = values;
  kernels.decode_apart(m, to.tile, scratch);
  for (int64_t t = 0; t < to.tokens; ++t)
    for (const std::span<const int32_t> columns : columns_apart(m))
      for (const int32_t column : columns) *value++ = load_element(x, (to.first_token + t) * m.cols + column);
  kernels.multiply(scratch, apart, values, to.tokens, to.sums, to.stride);
}

// --- panels of 16 bits ---

// A matrix among those that are multiplied together, and the activations it shares with others.
struct WordProduct {
  const MatrixView& m;
  const ActivationView& y;
  int64_t first_tile;         // of all matrices in a row
  size_t maker = 0;           // whose activations serve this one
  uint16_t* words = nullptr;  // (chunks, padded tokens, chunk_columns): what one panel needs lies together
  float* steps = nullptr;     // (chunks, padded tokens)
};

// Whether two matrices take the same activations as the same words: those with as wide sums and the same
// columns apart.
bool share_words(const MatrixView& a, const MatrixView& b) {
  return a.chunk_columns == b.chunk_columns && (a.levels > 1) == (b.levels > 1) && same_columns_apart(a, b);
}

// All products with the same activations. Tokens are padded to whole steps of the kernels.
struct WordPlan {
  std::vector<WordProduct> all;
  int64_t padded_tokens;
  int64_t tiles = 0;
  int64_t useful = 1;       // threads
  int64_t panel_words = 0;  // of a thread, as are the following
  int64_t sum_floats = 0, apart_floats = 0;
  uint16_t* panels = nullptr;  // (useful, panel_words)
  float* floats = nullptr;     // (useful, thread_floats)

  int64_t thread_floats() const { return kTileRows + sum_floats + apart_floats; }
  const WordProduct& product_of(int64_t tile) const {
    return *std::find_if(all.rbegin(), all.rend(),
                         [&](const WordProduct& each) { return each.first_tile <= tile; });
  }
};

WordPlan plan_words(const WordKernels& words, std::span<const Product> products, const ActivationView& x) {
  WordPlan plan = {.all = {}, .padded_tokens = ceil_div(x.tokens, words.token_step) * words.token_step};
  const int64_t turn_tokens = std::min(plan.padded_tokens, kTurnTokens);
  int64_t rows = 0, word_count = 0, step_count = 0;
  for (const Product& product : products) {
    const MatrixView& m = matrix_of(product);
    plan.all.push_back({.m = m, .y = product.y, .first_tile = plan.tiles});
    plan.all.back().maker = find_maker(plan.all, share_words);
    plan.tiles += m.tiles;
    rows += m.rows;
    plan.apart_floats = std::max(plan.apart_floats, apart_floats(m, turn_tokens));
    if (plan.all.back().maker + 1 != plan.all.size()) continue;
    word_count += plan.padded_tokens * m.chunks * m.chunk_columns;
    step_count += plan.padded_tokens * m.chunks;
  }
  plan.useful =
      useful_threads(x.tokens * rows * x.width, plan.tiles * ceil_div(x.tokens, words.share_tokens));
  plan.panel_words = kChunkColumns * kTileRows;
  plan.sum_floats = kTurnTiles * turn_tokens * kTileRows;

  thread_local AlignedVector<uint16_t> word_scratch, panel_scratch;
  thread_local AlignedVector<float> step_scratch, float_scratch;
  uint16_t* at = grow(word_scratch, word_count);
  float* steps = grow(step_scratch, step_count);
  plan.panels = grow(panel_scratch, plan.useful * plan.panel_words);
  plan.floats = grow(float_scratch, plan.useful * plan.thread_floats());
  for (size_t i = 0; i < plan.all.size(); ++i) {
    WordProduct& own = plan.all[i];
    if (own.maker != i) {
      own.words = plan.all[own.maker].words;
      own.steps = plan.all[own.maker].steps;
      continue;
    }
    own.words = at;
    own.steps = steps;
    at += plan.padded_tokens * own.m.chunks * own.m.chunk_columns;
    steps += plan.padded_tokens * own.m.chunks;
  }
  return plan;
}

// The threads bring the activations into 16 bits together, and wait for each other.
void arrange_words(const Kernels& kernels, const WordKernels& words, const WordPlan& plan,
                   const ActivationView& x) {
  for (size_t i = 0; i < plan.all.size(); ++i) {
    const WordProduct& own = plan.all[i];
    if (own.maker != i) continue;
#pragma omp for schedule(static) nowait
    for (int64_t token = 0; token < plan.padded_tokens; ++token)
      for (int64_t chunk = 0; chunk < own.m.chunks; ++chunk) {
        const int64_t at = chunk * plan.padded_tokens + token;
        alignas(64) float values[kChunkColumns] = {};
        if (token < x.tokens) load_chunk(kernels, own.m, x, token, chunk, values);
        words.arrange(own.m, values, own.words + at * own.m.chunk_columns, own.steps + at);
      }
  }
#pragma omp barrier
}

// Some tiles of one matrix times some tokens.
void multiply_share(const Kernels& kernels, const WordKernels& words, const WordPlan& plan,
                    const WordProduct& own, const Share& share, const ActivationView& x, int64_t thread) {
  const MatrixView& m = own.m;
  const int64_t tokens = share.last_token - share.first_token,
                padded = ceil_div(tokens, words.token_step) * words.token_step;
  uint16_t* const panel = plan.panels + thread * plan.panel_words;
  float* const scales = plan.floats + thread * plan.thread_floats();
  float* const sums = scales + kTileRows;  // (tiles, padded, 64)
  std::fill_n(sums, share.tiles * padded * kTileRows, 0.0f);
  for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
    const int64_t first = chunk * plan.padded_tokens + share.first_token;
    for (int64_t i = 0; i < share.tiles; ++i) {
      for (int sum = 0; sum < m.sums; ++sum) {
        words.decode(m, share.tile + i, chunk, sum, panel, scales);
        words.multiply(
            {.panel = panel, .scales = scales, .columns = m.chunk_columns},
            {.x = own.words + first * m.chunk_columns, .steps = own.steps + first, .tokens = padded},
            sums + i * padded * kTileRows, kTileRows);
      }
    }
  }
  for (int64_t i = 0; i < share.tiles; ++i) {
    const TileSums result = {.m = m,
                             .tile = share.tile + i,
                             .first_token = share.first_token,
                             .tokens = tokens,
                             .sums = sums + i * padded * kTileRows,
                             .stride = kTileRows};
    add_columns_apart(kernels, result, x, sums + plan.sum_floats);
    store_tile(kernels, result, own.y);
  }
}

void multiply_words(const Kernels& kernels, const WordKernels& words, std::span<const Product> products,
                    const ActivationView& x) {
  const WordPlan plan = plan_words(words, products, x);
#pragma omp parallel num_threads(team_size(plan.useful))
  {
    arrange_words(kernels, words, plan, x);
    const ThreadPlace place = ThreadPlace::among(plan.useful);
    for_each_share(place, plan.tiles, x.tokens, words.share_tokens, kTurnTiles, [&](Share share) {
      const int64_t last_tile = share.tile + share.tiles, last_token = share.last_token;
      for (; share.tile < last_tile; share.tile += share.tiles) {
        const WordProduct& own = plan.product_of(share.tile);
        share.tiles = std::min(last_tile, own.first_tile + own.m.tiles) - share.tile;
        Share turn = share;
        turn.tile -= own.first_tile;
        for (; turn.first_token < last_token; turn.first_token = turn.last_token) {
          turn.last_token = std::min(last_token, turn.first_token + kTurnTokens);
          multiply_share(kernels, words, plan, own, turn, x, place.thread);
        }
      }
    });
  }
}

// --- lookups ---

// A matrix among those that are multiplied together, and its part of what they share.
struct Lookup {
  const MatrixView& m;
  const ActivationView& y;
  int64_t first_byte;  // of a chunk's codes of all matrices in a row
  int64_t padded_rows;
  size_t maker = 0;           // whose tables serve this one
  uint8_t* tables = nullptr;  // (chunks of a panel, tokens of a batch, sums, set_bytes)
  float* steps = nullptr;     // (chunks of a panel, tokens of a batch, sums)
  float* sums = nullptr;      // (tokens of a batch, padded_rows)

  // Of a chunk and token.
  int64_t chunk_table_bytes() const { return m.sums * set_bytes(); }
  int64_t set_bytes() const { return kChunkColumns / m.group * m.table_bytes; }
};

// Whether two matrices have the same tables, given the same activations: those of one N:M with one level
// (several are part of the tables) and of the same columns apart (which are left out). A matrix shares with
// itself.
bool share_tables(const MatrixView& a, const MatrixView& b) {
  if (&a == &b) return true;
  return a.levels == 1 && b.levels == 1 && a.file_keep == b.file_keep && a.file_group == b.file_group &&
         same_columns_apart(a, b);
}

// All lookups with the same activations, and how the threads go through them: batches of tokens, and for each
// of them panels of chunks, whose tables exist at the same time.
struct LookupPlan {
  std::vector<Lookup> lookups;
  int64_t batch;   // tokens
  int64_t chunks;  // per row
  int64_t panel_chunks;
  int64_t code_bytes = 0;                    // of a chunk of all matrices
  int64_t useful = 1;                        // threads
  int64_t table_bytes = 0, step_floats = 0;  // of a chunk and token
  int64_t sum_floats = 0;                    // of a token
  float* apart_scratch = nullptr;            // (useful, thread_floats)
  int64_t thread_floats = 0;
};

// What lookups write before they write the result.
struct LookupScratch {
  AlignedVector<uint8_t> tables;
  AlignedVector<float> steps, sums, apart;
};

LookupPlan plan_lookups(std::span<const Product> products, const ActivationView& x) {
  LookupPlan plan = {.lookups = {},
                     .batch = std::min(kTokenBatch, x.tokens),
                     .chunks = matrix_of(products[0]).chunks,
                     .panel_chunks = 1};
  int64_t tiles = 0, rows = 0;
  for (const Product& product : products) {
    const MatrixView& m = matrix_of(product);
    plan.lookups.push_back(
        {.m = m, .y = product.y, .first_byte = plan.code_bytes, .padded_rows = m.tiles * kTileRows});
    Lookup& lookup = plan.lookups.back();
    lookup.maker = find_maker(plan.lookups, share_tables);
    tiles += m.tiles;
    plan.code_bytes += m.tiles * m.chunk_bytes;
    rows += m.rows;
    plan.sum_floats += lookup.padded_rows;
    plan.step_floats += m.sums;
    plan.thread_floats = std::max(plan.thread_floats, apart_floats(m, plan.batch));
    if (lookup.maker + 1 == plan.lookups.size()) plan.table_bytes += lookup.chunk_table_bytes();
  }
  plan.useful = useful_threads(x.tokens * rows * x.width, tiles);
  plan.panel_chunks = std::clamp<int64_t>(kTableBudget / (plan.batch * plan.table_bytes), 1, plan.chunks);
  return plan;
}

// Gives a plan its places in `scratch`, which grows where it has to.
void place_lookups(LookupPlan& plan, LookupScratch& scratch) {
  const int64_t table_count = plan.panel_chunks * plan.batch;
  uint8_t* tables = grow(scratch.tables, table_count * plan.table_bytes);
  float* steps = grow(scratch.steps, table_count * plan.step_floats);
  float* sums = grow(scratch.sums, plan.batch * plan.sum_floats);
  plan.apart_scratch = grow(scratch.apart, plan.useful * plan.thread_floats);
  for (size_t i = 0; i < plan.lookups.size(); ++i) {
    Lookup& lookup = plan.lookups[i];
    lookup.sums = sums;
    sums += plan.batch * lookup.padded_rows;
    if (lookup.maker != i) {
      lookup.tables = plan.lookups[lookup.maker].tables;
      lookup.steps = plan.lookups[lookup.maker].steps;
      continue;
    }
    lookup.tables = tables;
    lookup.steps = steps;
    tables += table_count * lookup.chunk_table_bytes();
    steps += table_count * lookup.m.sums;
  }
}

// The thread's tiles of a matrix: those of all matrices are dealt out by the bytes of their codes, in whole
// strips.
struct TileRange {
  int64_t first, last;
  TileRange(const ThreadPlace& place, const Lookup& lookup, int64_t all_bytes) {
    const auto tiles_before = [&](int64_t bytes) {
      const int64_t tile =
          std::clamp<int64_t>((bytes - lookup.first_byte) / lookup.m.chunk_bytes, 0, lookup.m.tiles);
      return tile == lookup.m.tiles ? tile : tile - tile % lookup.m.strip_tiles;
    };
    first = tiles_before(place.begin(all_bytes));
    last = tiles_before(place.end(all_bytes));
  }
};

// The team makes the tables of chunks [first_chunk, + chunks) for tokens [first_token, + tokens), and waits
// for all.
void make_tables(const Kernels& kernels, const LookupPlan& plan, const ActivationView& x,
                 const TeamPlace& team, int64_t first_chunk, int64_t chunks, int64_t first_token,
                 int64_t tokens) {
  for (size_t own = 0; own < plan.lookups.size(); ++own) {
    const Lookup& lookup = plan.lookups[own];
    if (lookup.maker != own) continue;
    const int64_t last = team.end(chunks * tokens);
    for (int64_t i = team.begin(chunks * tokens); i < last; ++i) {
      alignas(64) float values[kChunkColumns];
      load_chunk(kernels, lookup.m, x, first_token + i % tokens, first_chunk + i / tokens, values);
      for (int sum = 0; sum < lookup.m.sums; ++sum) {
        const int64_t set = i * lookup.m.sums + sum;
        kernels.tabulate(lookup.m, sum, values, lookup.tables + set * lookup.set_bytes(), lookup.steps + set);
      }
    }
  }
  team.wait_for_all();
}

// Scales the sums of the thread's tiles, which look_up() leaves without row scales, and writes them out.
void finish_tiles(const Kernels& kernels, const Lookup& lookup, const TileRange& own, const ActivationView& x,
                  int64_t first_token, int64_t tokens, float* scratch) {
  const MatrixView& m = lookup.m;
  const float level = m.levels == 1 ? m.level[0] : 1.0f;
  for (int64_t tile = own.first; tile < own.last; ++tile) {
    const TileSums result = {.m = m,
                             .tile = tile,
                             .first_token = first_token,
                             .tokens = tokens,
                             .sums = lookup.sums + tile * kTileRows,
                             .stride = lookup.padded_rows};
    for (int64_t t = 0; m.row_scales != nullptr && t < tokens; ++t)
      for (int r = 0; r < kTileRows; ++r)
        result.sums[t * result.stride + r] *= m.row_scales[tile * kTileRows + r] * level;
    add_columns_apart(kernels, result, x, scratch);
    store_tile(kernels, result, lookup.y);
  }
}

// All threads of the team call this together.
void run_lookups(const Kernels& kernels, const LookupPlan& plan, const ActivationView& x,
                 const TeamPlace& team) {
  const ThreadPlace place = team.among(plan.useful);
  for (int64_t first = 0; first < x.tokens; first += plan.batch) {
    const int64_t tokens = std::min(plan.batch, x.tokens - first);
    for (const Lookup& lookup : plan.lookups) {
      const TileRange own(place, lookup, plan.code_bytes);
      for (int64_t t = 0; t < tokens; ++t)
        std::fill(lookup.sums + t * lookup.padded_rows + own.first * kTileRows,
                  lookup.sums + t * lookup.padded_rows + own.last * kTileRows, 0.0f);
    }

    for (int64_t panel = 0; panel < plan.chunks; panel += plan.panel_chunks) {
      const int64_t chunks = std::min(plan.panel_chunks, plan.chunks - panel);
      make_tables(kernels, plan, x, team, panel, chunks, first, tokens);
      for (const Lookup& lookup : plan.lookups) {
        const TileRange own(place, lookup, plan.code_bytes);
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          kernels.look_up(lookup.m, {.chunk = panel + chunk,
                                     .first_tile = own.first,
                                     .last_tile = own.last,
                                     .sets = tokens * lookup.m.sums,
                                     .first_set = 0,
                                     .tables = lookup.tables + chunk * tokens * lookup.chunk_table_bytes(),
                                     .steps = lookup.steps + chunk * tokens * lookup.m.sums,
                                     .y = lookup.sums,
                                     .y_stride = lookup.padded_rows});
      }
      const bool tables_serve_again =
          panel + plan.panel_chunks < plan.chunks || first + plan.batch < x.tokens;
      if (tables_serve_again) team.wait_for_all();
    }

    float* const scratch = plan.apart_scratch + place.thread * plan.thread_floats;
    for (const Lookup& lookup : plan.lookups)
      finish_tiles(kernels, lookup, {place, lookup, plan.code_bytes}, x, first, tokens, scratch);
  }
}

void multiply_lookups(const Kernels& kernels, std::span<const Product> products, const ActivationView& x) {
  thread_local LookupScratch scratch;
  LookupPlan plan = plan_lookups(products, x);
  place_lookups(plan, scratch);
  Barrier barrier;
#pragma omp parallel num_threads(team_size(plan.useful))
  if (const TeamPlace team = TeamPlace::among(plan.useful, barrier); !team.is_outside())
    run_lookups(kernels, plan, x, team);
}

class PlannedLookups : public PlannedProducts {
 public:
  PlannedLookups(const Kernels& kernels, std::vector<ProductSet> sets)
      : kernels_(kernels), sets_(std::move(sets)) {
    for (const ProductSet& set : sets_) plans_.push_back(plan_lookups(set.products, set.x));
    for (LookupPlan& plan : plans_) place_lookups(plan, scratch_);  // until it has grown
    for (LookupPlan& plan : plans_) place_lookups(plan, scratch_);
  }
  void run(size_t index, const TeamPlace& team) const override {
    run_lookups(kernels_, plans_[index], sets_[index].x, team);
  }

 private:
  const Kernels& kernels_;
  std::vector<ProductSet> sets_;
  std::vector<LookupPlan> plans_;
  LookupScratch scratch_;
};

enum class Way { kPanels, kRows, kIntegers, kBfloat16, kLookups };

/// From so many tokens on, enough of them share the decoding of a weight. Nibbles of one column take as many
/// look-ups as there are columns, so that fewer tokens do.
int64_t many_tokens(const MatrixView& m) { return m.form == CodeForm::kNibbles && m.group == 1 ? 8 : 32; }

Way way_of(const Kernels& kernels, const MatrixView& m, const ActivationView& x) {
  const bool integers = kernels.integers != nullptr;
  if (m.form == CodeForm::kRows && x.tokens <= kFewTokens) return Way::kRows;
  if (m.form == CodeForm::kPlane || x.type == ElementType::kFloat32) return Way::kPanels;
  const bool bfloat16 = kernels.bfloat16 != nullptr && x.type == ElementType::kBFloat16;
  if (m.form == CodeForm::kRows) return bfloat16 ? Way::kBfloat16 : integers ? Way::kIntegers : Way::kPanels;
  if (x.tokens < many_tokens(m)) return Way::kLookups;
  if (bfloat16) return Way::kBfloat16;
  if (m.sums > 1)
    return Way::kPanels;  // whose one product in float32 takes less time than one for each level
  const bool nibbles = m.form == CodeForm::kNibbles;
  if (integers && (!permutes_fast() || (nibbles && m.group == 1))) return Way::kIntegers;
  // Where rows are few, making a table costs more than looking things up in it. The two met at 6 to 30 rows
  // per entry, depending on layout and processor (stbllm-bench --models smollm2 --tokens 512), and integers
  // met nibbles at 100, which AMD's processors multiply and look up at the same rate.
  const int64_t rows_per_entry = integers && nibbles ? 128 : 16;
  if (m.rows >= rows_per_entry * m.entries) return Way::kLookups;
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
    std::vector<Product> looked_up, as_integers, as_bfloat16;
    for (const Product& product : products) {
      const MatrixView& m = checked_view(product, x);
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
        case Way::kBfloat16:
          as_bfloat16.push_back(product);
          break;
        case Way::kLookups:
          looked_up.push_back(product);
          break;
      }
    }
    if (!as_integers.empty()) multiply_words(kernels_, *kernels_.integers, as_integers, x);
    if (!as_bfloat16.empty()) multiply_words(kernels_, *kernels_.bfloat16, as_bfloat16, x);
    if (!looked_up.empty()) multiply_lookups(kernels_, looked_up, x);
  }

  std::unique_ptr<PlannedProducts> plan(std::vector<ProductSet> sets) const override {
    for (const ProductSet& set : sets)
      for (const Product& product : set.products)
        if (way_of(kernels_, checked_view(product, set.x), set.x) != Way::kLookups) return nullptr;
    return std::make_unique<PlannedLookups>(kernels_, std::move(sets));
  }

 private:
  const MatrixView& checked_view(const Product& product, const ActivationView& x) const {
    const auto& matrix = dynamic_cast<const CpuMatrix&>(*product.matrix);
    STBLLM_CHECK(&matrix.kernels() == &kernels_, "a matrix prepared by {} was given to {}",
                 matrix.kernels().name, kernels_.name);
    check_activations(matrix.view().rows, matrix.view().cols, x, product.y);
    return matrix.view();
  }

  const Kernels& kernels_;
};

}  // namespace
}  // namespace cpu

const Backend& cpu_backend(CpuIsa isa) {
  static const cpu::CpuBackend backends[] = {  // in the order of kCpuIsas
    cpu::CpuBackend(cpu::kGenericKernels),
#if defined(__x86_64__)
    cpu::CpuBackend(cpu::kAvx2Kernels),
    cpu::CpuBackend(cpu::kAvxVnniKernels),
    cpu::CpuBackend(cpu::kAvx512Kernels),
    cpu::CpuBackend(cpu::kAmxKernels),
#elif defined(__aarch64__)
    cpu::CpuBackend(cpu::kNeonKernels),
#endif
  };
  static_assert(std::size(backends) == std::size(kCpuIsas));
  return backends[static_cast<size_t>(isa)];
}

std::string_view missing_cpu_feature([[maybe_unused]] CpuIsa isa) {
#if defined(__x86_64__)
#define STBLLM_NEED(feature) \
  if (!__builtin_cpu_supports(feature)) return feature
  if (isa >= CpuIsa::kAvx2) {
    STBLLM_NEED("avx2");
    STBLLM_NEED("fma");
    if (!has_f16c()) return "f16c";
  }
  if (isa == CpuIsa::kAvxVnni && !has_avx_vnni()) return "avx-vnni";
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
  if (isa >= CpuIsa::kAmx) {
    if (!has_amx_bf16()) return "amx-bf16";
    if (!may_use_amx()) return "amx-bf16 that the system allows to use";
  }
#endif
  return {};
}

}  // namespace stbllm
