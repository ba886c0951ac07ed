#include "products.h"

#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "ceilings.h"
#include "dense.h"
#include "shapes.h"
#include "stbllm/backend/backend.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "timing.h"

namespace stbllm::bench {
namespace {

// "2:4" has one level and 5-bit scale codes, "2:4x3" three levels, "2:4x3/fp16" fp16 scales per level and
// block, and
// "+salient" one column in 32 with residual signs, which is what the paper's recipe stores.
Layout parse_layout(const std::string& text, int64_t rows, int64_t cols) {
  Layout layout = {.rows = rows, .cols = cols, .nm = {}, .scale_bits = 5};
  std::string rest = text;
  const auto strip = [&](std::string_view suffix) {
    if (!rest.ends_with(suffix)) return false;
    rest.resize(rest.size() - suffix.size());
    return true;
  };
  if (strip("+salient")) layout.salient = cols / 32;
  if (strip("/fp16")) layout.scale_bits = 16;
  if (strip("x3")) layout.levels = 3;
  if (strip("x2")) layout.levels = 2;
  layout.nm = NmPattern::parse(rest);
  layout.validate("layout " + text);
  return layout;
}

// Random codes and scales of one magnitude. Rows and columns are multiples of 16 in all shapes, so that no
// group is cut.
StructuredBinaryMatrix random_matrix(const Layout& layout) {
  struct Owner {
    std::array<std::vector<std::byte>, kPlaneCount> planes;
  };
  auto owner = std::make_shared<Owner>();
  const auto plane = [&](Plane p) { return owner->planes[static_cast<size_t>(p)].data(); };
  StructuredBinaryMatrix::Planes views;
  for (int i = 0; i < kPlaneCount; ++i) {
    owner->planes[i].resize(static_cast<size_t>(plane_bytes(layout, static_cast<Plane>(i))));
    views[i] = owner->planes[i];
  }
  std::mt19937_64 rng(1);
  std::vector<bool> salient(static_cast<size_t>(layout.cols));
  for (int64_t i = 0; i < layout.salient; ++i) {
    const auto column = static_cast<int32_t>(i * 32 + 5);
    std::memcpy(plane(Plane::kSalientColumns) + 4 * i, &column, 4);
    salient[column] = true;
  }
  const uint64_t states = layout.code_states();
  const int bits = layout.code_bits(), keep = layout.nm.keep, group_size = layout.nm.group;
  for (int64_t row = 0; row < layout.rows; ++row)
    for (int64_t group = 0; group < layout.groups(); ++group) {
      uint64_t code = rng() % states;
      if (layout.salient > 0) {  // salient columns have level 0
        GroupSymbols symbols = decode_group(layout.nm, layout.levels, code);
        for (int k = 0; k < keep; ++k)
          if (salient[group * group_size + symbols.position[k]]) symbols.level[k] = 0;
        code = encode_group(layout.nm, layout.levels, symbols);
      }
      write_bits(plane(Plane::kCodes) + row * layout.code_row_bytes(), group * bits, bits, code);
    }
  for (const Plane p : {Plane::kScales, Plane::kRowScales, Plane::kLevels}) {
    const uint16_t scale = float_to_half(0.02f);
    for (size_t i = 0; i < owner->planes[static_cast<size_t>(p)].size(); i += 2)
      std::memcpy(plane(p) + i, &scale, 2);
  }
  return {layout, views, owner, "random matrix"};
}

// How many copies of so many bytes it takes that none is in a cache when its turn comes again.
int copies_for(int64_t cold_mib, int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(cold_mib << 20, bytes), 1, 64));
}

struct PreparedCopies {
  std::vector<std::unique_ptr<PreparedMatrix>> copies;
  double cpu_seconds;  // of one
};

PreparedCopies prepare_copies(const Backend& backend, const StructuredBinaryMatrix& matrix,
                              int64_t cold_mib) {
  PreparedCopies prepared;
  const double start = seconds_on(CLOCK_PROCESS_CPUTIME_ID);
  prepared.copies.push_back(backend.prepare(matrix));
  prepared.cpu_seconds = seconds_on(CLOCK_PROCESS_CPUTIME_ID) - start;
  while (std::ssize(prepared.copies) < copies_for(cold_mib, prepared.copies[0]->bytes()))
    prepared.copies.push_back(backend.prepare(matrix));
  return prepared;
}

// Seconds of the dense products by threads, tokens and type.
using DenseSeconds = std::map<std::tuple<int, int64_t, ElementType>, double>;

DenseSeconds measure_dense(const Shape& shape, const ProductOptions& options) {
  DenseSeconds seconds;
  if (!options.dense) return seconds;
  for (const int threads : options.threads)
    for (const int64_t tokens : options.tokens)
      for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16}) {
        const int64_t bytes = shape.rows * shape.cols * (type == ElementType::kFloat32 ? 4 : 2);
        seconds[{threads, tokens, type}] =
            dense_seconds(type, shape.rows, shape.cols, tokens, copies_for(options.cold_mib, bytes),
                          options.min_seconds, threads);
      }
  return seconds;
}

// Seconds of one product with the copies in turn.
double measure_packed(const Backend& backend, const std::vector<std::unique_ptr<PreparedMatrix>>& copies,
                      const Layout& layout, int64_t tokens, ElementType type, int threads,
                      double min_seconds) {
  std::vector<float> x(static_cast<size_t>(tokens * layout.cols)),
      y(static_cast<size_t>(tokens * layout.rows));
  std::mt19937 rng(2);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < tokens * layout.cols; ++i) {
    const float value = normal(rng);
    if (type == ElementType::kFloat32)
      x[i] = value;
    else
      reinterpret_cast<uint16_t*>(x.data())[i] = float_to_bfloat16(value);
  }
  const ActivationView in = {x.data(), type, tokens, layout.cols},
                       out = {y.data(), type, tokens, layout.rows};
  return best_seconds(threads, min_seconds, static_cast<int>(copies.size()),
                      [&](int i) { backend.matmul(*copies[i], in, out); });
}

nlohmann::json print_ceilings(const Ceilings& ceilings) {
  nlohmann::json json = ceilings.per_core;
  for (size_t t = 0; t < ceilings.bandwidth.size(); ++t) {
    json[fmt::format("read bandwidth, {} threads", t + 1)] = ceilings.bandwidth[t];
    fmt::print("read bandwidth, {} threads  {:6.1f} GB/s\n", t + 1, ceilings.bandwidth[t] / 1e9);
  }
  for (const auto& [name, rate] : ceilings.per_core)
    fmt::print("{:<25} {:7.1f} G/s per core\n", name, rate / 1e9);
  return json;
}

// What the products of one matrix are measured with and compared to.
struct Comparison {
  const ProductOptions& options;
  const Ceilings& ceilings;
  const Shape& shape;
  const DenseSeconds& dense;
};

// One product, printed and as JSON.
nlohmann::json measure_product(const Comparison& with, const Backend& backend, const PreparedCopies& prepared,
                               const StructuredBinaryMatrix& matrix, const std::string& layout, int threads,
                               int64_t tokens) {
  const ElementType type = with.options.type == "fp32" ? ElementType::kFloat32 : ElementType::kBFloat16;
  const double seconds = measure_packed(backend, prepared.copies, matrix.layout(), tokens, type, threads,
                                        with.options.min_seconds);
  const double weights = static_cast<double>(with.shape.rows * with.shape.cols);
  const double products_per_second = weights * static_cast<double>(tokens) / seconds;
  const double bytes_per_second = static_cast<double>(prepared.copies[0]->bytes()) / seconds;
  const double share = bytes_per_second / with.ceilings.bandwidth[threads - 1];
  const auto speedup = [&](ElementType dense_type) {
    const auto found = with.dense.find({threads, tokens, dense_type});
    return found == with.dense.end() ? std::nan("") : found->second / seconds;
  };
  const double over_float32 = speedup(ElementType::kFloat32), over_bfloat16 = speedup(ElementType::kBFloat16);
  fmt::print(
      "{:<22} {:<20} {:<12} {:>7} {:>6} {:>10.1f} {:>9.1f} {:>8.1f} {:>7.1f} {:>6.0f}% {:>7.1f}x {:>7.1f}x\n",
      fmt::format("{} {}", with.shape.model, with.shape.layer), layout, backend.name(), threads, tokens,
      seconds * 1e6, products_per_second / 1e9, 2 * products_per_second / 1e9, bytes_per_second / 1e9,
      100 * share, over_float32, over_bfloat16);
  std::fflush(stdout);
  return {{"model", with.shape.model},
          {"layer", with.shape.layer},
          {"rows", with.shape.rows},
          {"cols", with.shape.cols},
          {"layout", layout},
          {"backend", backend.name()},
          {"activations", with.options.type},
          {"threads", threads},
          {"tokens", tokens},
          {"ns", seconds * 1e9},
          {"gweights_per_s", products_per_second / 1e9},
          {"gop_per_s", 2 * products_per_second / 1e9},
          {"gb_per_s", bytes_per_second / 1e9},
          {"stored_bits", matrix.stored_bits()},
          {"prepared_bytes", prepared.copies[0]->bytes()},
          {"prepare_cpu_seconds", prepared.cpu_seconds},
          {"share_of_bandwidth", share},
          {"speedup_over_dense_fp32", over_float32},
          {"speedup_over_dense_bf16", over_bfloat16}};
}

}  // namespace

void measure_products(const ProductOptions& options) {
  const int most_threads = *std::ranges::max_element(options.threads);
  const Ceilings ceilings = measure_ceilings(most_threads);
  nlohmann::json report = {{"ceilings", print_ceilings(ceilings)}, {"results", nlohmann::json::array()}};
  fmt::print("\n{:<22} {:<20} {:<12} {:>7} {:>6} {:>10} {:>9} {:>8} {:>7} {:>7} {:>8} {:>8}\n", "layer",
             "layout", "backend", "threads", "tokens", "us", "Gweight/s", "GOP/s", "GB/s", "memory", "/fp32",
             "/bf16");
  for (const Shape& shape : kShapes) {
    if (std::ranges::find(options.models, shape.model) == options.models.end()) continue;
    const DenseSeconds dense = measure_dense(shape, options);
    const Comparison with = {.options = options, .ceilings = ceilings, .shape = shape, .dense = dense};
    for (const std::string& layout : options.layouts) {
      const StructuredBinaryMatrix matrix = random_matrix(parse_layout(layout, shape.rows, shape.cols));
      for (const std::string& name : options.backends) {
        const Backend& backend = find_backend(name);
        omp_set_num_threads(most_threads);
        const PreparedCopies prepared = prepare_copies(backend, matrix, options.cold_mib);
        for (const int threads : options.threads) {
          omp_set_num_threads(threads);
          for (const int64_t tokens : options.tokens)
            report["results"].push_back(
                measure_product(with, backend, prepared, matrix, layout, threads, tokens));
        }
      }
    }
  }
  if (options.json.empty()) return;
  std::ofstream file(options.json);
  if (!(file << report.dump(1) << '\n'))
    fail(ErrorCode::kWriteFailed, "{}: cannot write the figures; check the path and the space", options.json);
}

}  // namespace stbllm::bench
