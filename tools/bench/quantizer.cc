#include "quantizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "ceilings.h"
#include "shapes.h"
#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"
#include "stbllm/base/reproducible.h"
#include "stbllm/quantize/quantize_linear.h"
#include "stbllm/recipe/recipe.h"
#include "timing.h"

namespace stbllm::bench {
namespace {

constexpr double kCalibrationTokens = 16 * 2048;

/// Operations per second of libtorch's product of two matrices.
double product_rate(at::ScalarType type, int threads) {
  constexpr int64_t kSize = 2048;
  const at::Tensor a = at::full({kSize, kSize}, 0.01, type);
  return 2.0 * kSize * kSize * kSize / best_seconds(threads, 0.5, 1, [&](int) { return at::mm(a, a); });
}

/// (rows, cols), with heavier tails than a normal distribution.
at::Tensor random_weight(int64_t rows, int64_t cols) {
  return at::randn({rows, cols}) * (0.5 * at::randn({rows, cols})).exp() * 0.02;
}

/// (tokens, cols): 64 directions that all columns share, noise, and columns of very different size.
at::Tensor random_inputs(int64_t tokens, int64_t cols) {
  const at::Tensor shared = at::randn({tokens, 64}).mm(at::randn({64, cols})) / 8;
  return (shared + at::randn({tokens, cols})) * at::randn({cols}).exp();
}

/// The last eighth of the tokens is held out, as in a run of the command.
InputStats measure_statistics(const at::Tensor& inputs, const StatsOptions& options) {
  const int64_t tokens = inputs.size(0), cols = inputs.size(1), held_out = tokens / 8;
  // x x^T is symmetric: half of it is enough.
  const StageTimer timer("statistics", static_cast<double>(tokens) * static_cast<double>(cols * (cols + 1)));
  StatsAccumulator statistics(cols, options);
  statistics.add(inputs.narrow(0, 0, tokens - held_out), false);
  if (held_out > 0) statistics.add(inputs.narrow(0, tokens - held_out, held_out), true);
  return statistics.finish();
}

std::string_view last_part(std::string_view name) { return name.substr(name.rfind('/') + 1); }

/// What a stage that announces no operations must at least read and write; 0: unknown.
double bytes_per_weight(std::string_view stage) {
  static const std::map<std::string_view, double> kBytes = {
      {"salient search", 5},                                // float32 values and the mask
      {"region search", 5},  {"mask", 5}, {"binarize", 7},  // float32 values, sets; two planes of signs
      {"dequantize", 7},
  };
  const auto found = kBytes.find(last_part(stage));
  return found == kBytes.end() ? 0 : found->second;
}

struct Rates {
  double float32, float64, forward;  ///< operations per second; `forward` in the type of the calibration
  double bandwidth;                  ///< bytes per second
};

/// Stages printed and as JSON.
nlohmann::json stage_rows(const Shape& shape, const std::string& recipe, const Rates& rates,
                          const std::vector<Stage>& stages) {
  nlohmann::json rows = nlohmann::json::array();
  for (const auto& [name, seconds, flops, calls] : stages) {
    const double bytes =
        flops > 0 ? 0 : bytes_per_weight(name) * static_cast<double>(shape.rows * shape.cols);
    const double rate = last_part(name) == "factor" ? rates.float64 : rates.float32;
    const double share = (flops / rate + bytes / rates.bandwidth) / seconds;
    rows.push_back({{"model", shape.model},
                    {"layer", shape.layer},
                    {"rows", shape.rows},
                    {"cols", shape.cols},
                    {"recipe", recipe},
                    {"stage", name},
                    {"seconds", seconds},
                    {"calls", calls},
                    {"gflop_per_s", flops / seconds / 1e9},
                    {"gb_per_s", bytes / seconds / 1e9},
                    {"share_of_bound", share}});
    const auto known = [](double value, std::string text) { return value > 0 ? text : std::string("-"); };
    const auto depth = std::ranges::count(name, '/');
    fmt::print("{:<20} {:<13} {:<24} {:>11.5f} {:>9} {:>7} {:>6}\n",
               fmt::format("{} {}", shape.model, shape.layer), recipe,
               std::string(2 * depth, ' ') + std::string(last_part(name)), seconds,
               known(flops, fmt::format("{:.1f}", flops / seconds / 1e9)),
               known(bytes, fmt::format("{:.2f}", bytes / seconds / 1e9)),
               known(share, fmt::format("{:.0f}%", 100 * share)));
  }
  std::fflush(stdout);
  return rows;
}

/// What a whole model costs, from the times of its linears.
struct Derived {
  double linears = 0, statistics = 0, forwards = 0;  ///< seconds

  void add(const Shape& shape, const Recipe& recipe, const Rates& rates, double linear, double tap) {
    const auto count = static_cast<double>(shape.linears);
    const auto* pattern = std::get_if<PatternAllocation>(&recipe.model.allocation);
    const bool planned = pattern != nullptr && pattern->vary == PatternAllocation::Vary::kByOutliers;
    const int passes = planned ? 3 : 2;  // plan, statistics, outputs
    linears += count * linear;
    statistics += static_cast<double>(shape.taps) * tap;
    forwards += passes * 2 * count * static_cast<double>(shape.rows * shape.cols) * kCalibrationTokens /
                rates.forward;
  }
  double seconds() const { return linears + statistics + forwards; }
};

}  // namespace

void measure_quantizer(const QuantizerOptions& options) {
  make_products_reproducible();  // as the quantizer does
  std::vector<Recipe> recipes;
  for (const std::string& name : options.recipes) recipes.push_back(Recipe::load(name));
  const c10::InferenceMode guard;
  if (options.threads > 0) at::set_num_threads(options.threads);
  const int threads = at::get_num_threads();
  at::manual_seed(1);
  const double float32 = product_rate(at::kFloat, threads), bfloat16 = product_rate(at::kBFloat16, threads);
  const Rates rates = {float32, product_rate(at::kDouble, threads), std::max(float32, bfloat16),
                       measure_ceilings(threads).bandwidth.back()};
  nlohmann::json report = {{"threads", threads},
                           {"tokens", options.tokens},
                           {"ceilings",
                            {{"float32 product", float32},
                             {"float64 product", rates.float64},
                             {"bfloat16 product", bfloat16},
                             {"read bandwidth", rates.bandwidth}}},
                           {"results", nlohmann::json::array()},
                           {"derived", nlohmann::json::array()}};
  fmt::print(
      "{} threads: products {:.0f} GFLOP/s float32, {:.0f} float64, {:.0f} bfloat16; read bandwidth {:.1f} "
      "GB/s\n\n",
      threads, float32 / 1e9, rates.float64 / 1e9, bfloat16 / 1e9, rates.bandwidth / 1e9);
  fmt::print("{:<20} {:<13} {:<24} {:>11} {:>9} {:>7} {:>6}\n", "layer", "recipe", "stage", "seconds",
             "GFLOP/s", "GB/s", "bound");

  std::map<std::pair<std::string, std::string>, Derived> derived;  // by model and recipe
  for (const Shape& shape : kShapes) {
    if (std::ranges::find(options.models, shape.model) == options.models.end()) continue;
    const at::Tensor weight = random_weight(shape.rows, shape.cols),
                     inputs = random_inputs(options.tokens, shape.cols);
    for (const Recipe& recipe : recipes) {
      std::vector<Stage> best;  // of repeated runs: other work on the machine only ever slows a stage down
      const double begin = seconds_on(CLOCK_MONOTONIC);
      while (best.empty() || seconds_on(CLOCK_MONOTONIC) - begin < options.min_seconds) {
        reset_profile();
        const InputStats stats = measure_statistics(inputs, stats_options(recipe.method));
        {
          const StageTimer timer("linear");
          quantize_linear(weight, stats, recipe.method, {.scheme = usual_scheme(recipe.model.allocation)});
        }
        const std::vector<Stage> stages = profiled_stages();
        if (best.empty()) best = stages;
        for (size_t i = 0; i < best.size(); ++i)
          best[i].seconds = std::min(best[i].seconds, stages[i].seconds);
      }
      for (nlohmann::json& row : stage_rows(shape, recipe.name, rates, best))
        report["results"].push_back(std::move(row));
      const auto seconds = [&](std::string_view stage) {
        return std::ranges::find(best, stage, &Stage::name)->seconds;
      };
      derived[{shape.model, recipe.name}].add(
          shape, recipe, rates, seconds("linear"),
          seconds("statistics") * kCalibrationTokens / static_cast<double>(options.tokens));
    }
  }
  fmt::print("\n");
  for (const auto& [key, total] : derived) {
    const auto& [model, recipe] = key;
    fmt::print(
        "derived: {} by {} from 16 x 2048 tokens on this machine: {:.2f} hours = {:.0f} s linears + {:.0f} s "
        "statistics + {:.0f} s forwards at the rate of the product; no training\n",
        model, recipe, total.seconds() / 3600, total.linears, total.statistics, total.forwards);
    report["derived"].push_back({{"model", model},
                                 {"recipe", recipe},
                                 {"hours", total.seconds() / 3600},
                                 {"linears_seconds", total.linears},
                                 {"statistics_seconds", total.statistics},
                                 {"forwards_seconds", total.forwards}});
  }
  if (options.json.empty()) return;
  std::ofstream file(options.json);
  if (!(file << report.dump(1) << '\n'))
    fail(ErrorCode::kWriteFailed, "{}: cannot write the figures; check the path and the space", options.json);
}

}  // namespace stbllm::bench
