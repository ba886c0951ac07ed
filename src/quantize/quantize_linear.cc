#include "stbllm/quantize/quantize_linear.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <string_view>

#include "stbllm/base/bits.h"
#include "stbllm/base/clock.h"
#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"
#include "stbllm/quantize/binarize.h"
#include "stbllm/quantize/compensate.h"
#include "stbllm/quantize/lean_weight.h"
#include "stbllm/quantize/nm_select.h"

namespace stbllm {

/// The metric in which a lean code is chosen.
struct CodeMetric {
  double outlier_share, shrink, damping;  // of the recipe
  int max_outliers;
  bool factored;
  std::vector<int64_t> outliers;  // columns to be stored exactly, ascending
  at::Tensor hessian;             // shrunk, without outliers
  InverseFactor factor;           // of it, where `factored`
};

namespace {

/// `flops`: what the stage announces itself, without that of stages inside it; 0: no clear count.
template <typename Work>
auto timed(std::string_view stage, double flops, Work&& work) {
  const StageTimer timer(stage, flops);
  return work();
}

/// A Cholesky and the inverse of a triangle; with `three_steps` the inverse of a whole matrix and another
/// Cholesky.
double factor_flops(int64_t cols, bool three_steps) {
  return (three_steps ? 4. : 2.) / 3 * std::pow(static_cast<double>(cols), 3);
}

/// One search over all groups of the weight: per state a dot product of N terms and four operations for its
/// cost.
double search_flops(const LeanWeight& lean, int levels) {
  if (!GroupCodebook::enumerable(lean.nm, levels)) return 0;
  const double per_group =
      static_cast<double>(GroupCodebook(lean.nm, levels, lean.nm.group).states()) * (2 * lean.nm.keep + 3);
  return static_cast<double>(lean.rows() * lean.cols()) / lean.nm.group * per_group;
}

at::Tensor round_to_half(const at::Tensor& x) { return x.to(at::kHalf).to(at::kFloat); }

/// Columns that carry at least `share` of trace(H), the largest first `limit` of them, ascending.
std::vector<int64_t> find_outliers(const at::Tensor& hessian, double share, int limit) {
  std::vector<int64_t> columns;
  if (share <= 0 || limit <= 0) return columns;
  const at::Tensor diagonal = hessian.diagonal().cpu().contiguous();
  const float* energy = diagonal.data_ptr<float>();
  const double threshold = share * diagonal.sum(at::kDouble).item<double>();
  for (int64_t j = 0; j < diagonal.numel(); ++j)
    if (energy[j] > 0 && energy[j] >= threshold) columns.push_back(j);
  std::stable_sort(columns.begin(), columns.end(),
                   [&](int64_t a, int64_t b) { return energy[a] > energy[b]; });
  if (static_cast<int>(columns.size()) > limit) columns.resize(limit);
  std::sort(columns.begin(), columns.end());
  return columns;
}

at::Tensor shrink_hessian(const at::Tensor& hessian, double s) {
  at::Tensor h = hessian * (1 - s);
  h.diagonal().copy_(hessian.diagonal());
  return h;
}

void zero_columns(at::Tensor& hessian, const std::vector<int64_t>& outliers) {
  const at::Tensor columns = at::tensor(outliers, at::kLong).to(hessian.device());
  hessian.index_fill_(0, columns, 0);
  hessian.index_fill_(1, columns, 0);
}

/// Sorts values that are not negative: their bits are in the order of their values, so that three passes over
/// 11-bit digits do.
void sort_magnitudes(std::vector<float>& values) {
  std::vector<float> other(values.size());
  for (const int shift : {0, 11, 22}) {
    const auto digit = [&](float x) { return std::bit_cast<uint32_t>(x) >> shift & 2047; };
    std::array<size_t, 2048> place{};
    for (const float x : values) ++place[digit(x)];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), size_t{0});
    for (const float x : values) other[place[digit(x)]++] = x;
    values.swap(other);
  }
}

/// numpy.quantile of float32 values at float32 positions: index, fraction and interpolation are float32 too,
/// and many weights of a checkpoint are equal, so that a threshold often falls exactly on one of them.
std::vector<float> quantiles(std::vector<float> values, int count, float low, float high) {
  sort_magnitudes(values);
  std::vector<float> result(count);
  const at::Tensor grid = at::linspace(low, high, count, at::kFloat);
  for (int i = 0; i < count; ++i) {
    const float position = grid.data_ptr<float>()[i] * static_cast<float>(values.size() - 1);
    const auto below = static_cast<size_t>(position);
    const float a = values[below], b = values[std::min(below + 1, values.size() - 1)];
    const float t = position - std::floor(position);
    result[i] = t < 0.5f ? a + (b - a) * t : b - (b - a) * (1 - t);
  }
  return result;
}

/// The metric that `recipe` asks for, from the one before where that is the same.
std::shared_ptr<const CodeMetric> code_metric(const InputStats& stats, const Recipe& recipe, double shrink) {
  const bool factored = recipe.compensate != Compensate::kNone;
  if (const CodeMetric* last = stats.metric.get();
      last != nullptr && last->outlier_share == recipe.outlier_share &&
      last->max_outliers == recipe.max_outliers && last->shrink == shrink &&
      last->damping == recipe.damping && last->factored == factored)
    return stats.metric;
  stats.metric.reset();  // not two of them in memory
  CodeMetric metric{recipe.outlier_share,
                    shrink,
                    recipe.damping,
                    recipe.max_outliers,
                    factored,
                    find_outliers(stats.hessian, recipe.outlier_share, recipe.max_outliers),
                    shrink_hessian(stats.hessian, shrink),
                    {}};
  if (!metric.outliers.empty()) zero_columns(metric.hessian, metric.outliers);
  if (factored)
    metric.factor = timed("factor", factor_flops(stats.hessian.size(0), false),
                          [&] { return inverse_factor(metric.hessian, recipe.damping); });
  return stats.metric = std::make_shared<const CodeMetric>(std::move(metric));
}

/// Columns of inputs that are always zero, in host memory.
at::Tensor dead_columns(const at::Tensor& hessian) {
  return hessian.diagonal().eq(0).nonzero().flatten().cpu();
}

/// The paper's path, in host memory: fixed support, salient columns, regions by magnitude, block-wise
/// compensation.
BinarizedWeight quantize_by_regions(const at::Tensor& weight_t, const at::Tensor& hessian,
                                    const at::Tensor& norm_sq, const std::vector<int64_t>& outliers,
                                    const Recipe& recipe, LinearReport& report) {
  const int64_t cols = weight_t.size(0), rows = weight_t.size(1);
  // In float32 the rounding of a Cholesky depends on the number of threads: only the released arithmetic
  // needs it.
  const InverseFactor factor = timed("factor", factor_flops(cols, !recipe.packable()), [&] {
    return inverse_factor(hessian, recipe.damping, /*three_steps=*/!recipe.packable());
  });
  report.damping = factor.damping;
  report.damping_retries = factor.retries;
  const at::Tensor upper = factor.upper.cpu();
  const at::Tensor d = upper.diagonal().contiguous();
  at::Tensor work = weight_t.clone();
  work.index_fill_(0, dead_columns(hessian), 0);

  const int slots = recipe.levels + 2;
  const int64_t blocks = ceil_div(cols, recipe.column_block);
  BinarizedWeight result;
  result.nm = recipe.nm;
  result.levels = recipe.levels;
  result.column_block = recipe.column_block;
  result.scale_bits = recipe.scale_bits;
  at::Tensor symbols_t = at::zeros({cols, rows}, at::kChar);
  at::Tensor scales = at::zeros({rows, blocks, slots}, at::kFloat);
  at::Tensor dense = recipe.packable() ? at::Tensor() : at::zeros({cols, rows}, at::kFloat);
  std::vector<int32_t> salient_columns;
  std::vector<at::Tensor> salient_signs;
  // The released code prunes the whole layer first and then forgets the mask: pruned weights are zeros that
  // take part.
  const ImportanceScore importance(work, recipe.importance);
  if (!recipe.support_carried) work.mul_(nm_mask(importance(work, norm_sq, d), recipe.nm));

  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t start = b * recipe.column_block,
                  width = std::min<int64_t>(recipe.column_block, cols - start);
    const at::Tensor w = work.narrow(0, start, width).contiguous();
    const at::Tensor d_block = d.narrow(0, start, width);
    std::vector<int64_t>
        places;  // of columns of this block that are stored exactly: they have no part in the searches
    for (const int64_t column : outliers)
      if (column >= start && column < start + width) places.push_back(column - start);
    const at::Tensor outlier_places = at::tensor(places, at::kLong);
    const at::Tensor support = timed("mask", 0, [&] {
      if (!recipe.support_carried) return at::ones({width, rows}, at::kByte);
      at::Tensor score = importance(w, norm_sq.narrow(0, start, width), d_block).contiguous();
      return nm_mask(score.index_fill_(0, outlier_places, -std::numeric_limits<float>::infinity()),
                     recipe.nm);
    });
    const at::Tensor kept = support.index_fill(0, outlier_places, 0);
    const at::Tensor saliency = w.square() / d_block.square().unsqueeze(1);
    const bool on_saliency = recipe.search_on == SearchOn::kSaliency;
    const ColumnBlock search{
        on_saliency ? saliency : w, kept,
        on_saliency ? at::ones({width}, at::kFloat) : d_block.square().reciprocal().contiguous()};

    std::vector<uint8_t> salient(width, 0);
    int salient_count = 0;
    if (recipe.max_salient > 0) {
      const at::Tensor total = (saliency * kept).sum(1);
      const float* sum = total.data_ptr<float>();
      std::vector<int64_t> order(width);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return sum[x] > sum[y]; });
      // Differs from STBLLM: the released code tries 1..49 and binarizes the rest with order 2 during this
      // search.
      const int minimum = on_saliency ? 1 : 0;
      const int maximum = on_saliency ? recipe.max_salient - 1 : recipe.max_salient;
      salient_count = timed("salient search", 0, [&] {
        return search_salient(search, order, minimum, maximum, on_saliency ? 2 : 1, recipe.means);
      });
      for (int i = 0; i < salient_count; ++i) salient[order[i]] = 1;
    }
    report.salient_count.push_back(static_cast<int>(std::count(salient.begin(), salient.end(), 1)));

    float p1 = 0;
    if (recipe.levels > 1) {
      std::vector<float> values;
      values.reserve(width * rows);
      const float* v = search.values.data_ptr<float>();
      const uint8_t* k = kept.data_ptr<uint8_t>();
      for (int64_t c = 0; c < width; ++c)
        for (int64_t i = c * rows; i < (c + 1) * rows; ++i) {
          if (recipe.support_carried && (salient[c] || !k[i])) continue;
          values.push_back(salient[c] ? 0.f : std::fabs(v[i]));
        }
      if (!values.empty()) {
        const StageTimer timer("region search");
        const std::vector<float> thresholds = quantiles(std::move(values), 160, 0.10f, 0.90f);
        p1 = search_regions(search, salient, thresholds, recipe.levels, recipe.means,
                            recipe.upper_quantile_rule);
      }
      report.threshold.push_back(p1);
    }
    const at::Tensor sets = assign_sets(search, salient, p1, recipe.levels);
    BinarizedBlock fit =
        timed("binarize", 0, [&] { return binarize_sets(w, sets, recipe.levels, recipe.means); });
    if (recipe.packable()) fit.scale = round_to_half(fit.scale);
    const at::Tensor q = timed("dequantize", 0, [&] { return fit.dequantize(sets, recipe.levels); });
    if (recipe.packable()) {
      // +-(1 + level); salient columns are of level 0.
      const at::Tensor level = at::where(sets.eq(kSalientSet), at::ones_like(sets), sets).to(at::kChar);
      at::Tensor symbols = fit.sign * level;
      for (const int64_t c : places)
        symbols[c].copy_(support[c]);  // N of M is kept there too, whatever the code says
      symbols_t.narrow(0, start, width).copy_(symbols);
      scales.select(1, b).copy_(fit.scale);
      for (int64_t c = 0; c < width; ++c)
        if (salient[c]) {
          salient_columns.push_back(static_cast<int32_t>(start + c));
          // Pruned weights of a salient column have no residual; any sign will do.
          salient_signs.push_back(
              at::where(fit.residual_sign[c].eq(0), at::ones({rows}, at::kChar), fit.residual_sign[c]));
        }
    } else {
      dense.narrow(0, start, width).copy_(q);
    }
    at::Tensor delta = w - q;
    delta.index_fill_(0, outlier_places, 0);
    const int64_t rest = cols - start - width;
    if (recipe.compensate == Compensate::kBlock && rest > 0) {
      const StageTimer timer("compensate", 2.0 * static_cast<double>(rows * width * rest));
      const at::Tensor error = delta / d_block.unsqueeze(1);
      work.narrow(0, start + width, rest)
          .addmm_(upper.narrow(0, start, width).narrow(1, start + width, rest).t(), error, 1, -1);
    }
  }
  if (!recipe.packable()) {
    result.unpackable = dense.t().contiguous();
    return result;
  }
  result.symbols = symbols_t.t().contiguous();
  result.scales = salient_columns.empty() ? scales.narrow(2, 0, recipe.levels).contiguous() : scales;
  if (!salient_columns.empty()) {
    result.salient_columns = at::tensor(salient_columns, at::kInt);
    result.salient_signs = at::stack(salient_signs);
  }
  return result;
}

/// Our path: every code chosen by exhaustive search in the H metric, scales fitted afterwards. Where `metric`
/// is, if all states of a group can be tried there. weight_t in host memory.
LeanWeight optimize_lean(const at::Tensor& weight_t, const CodeMetric& metric, int sweeps,
                         const Recipe& recipe, LinearReport& report) {
  LeanWeight lean;
  lean.nm = recipe.nm;
  lean.column_block = recipe.column_block;
  lean.scale_bits = recipe.scale_bits;
  lean.target = weight_t.clone();
  const at::Device device =
      GroupCodebook::enumerable(recipe.nm, recipe.levels) ? metric.hessian.device() : at::kCPU;
  lean.hessian = metric.hessian.to(device);
  const at::Tensor upper = metric.factored ? metric.factor.upper.to(device) : at::Tensor();
  lean.target.index_fill_(0, dead_columns(lean.hessian), 0);  // outlier columns among them
  report.damping = metric.factor.damping;
  report.damping_retries = metric.factor.retries;
  const double one_search = search_flops(lean, recipe.levels);
  timed("encode", kEncodeSearches * one_search, [&] {
    initialize_scales(lean, recipe.levels, lean.hessian.diagonal().cpu().contiguous());
    lean.target = lean.target.to(device);
    lean.symbols = lean.symbols.to(device);
    encode_columns(lean, upper, recipe.compensate);
  });
  if (recipe.refit > 0) timed("refit", 0, [&] { refit(lean); });
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    const double changed = timed("descend", one_search, [&] { return descend(lean); });
    if (sweep < recipe.refit)
      timed("refit", 0, [&] { refit(lean, /*with_levels=*/sweep == 0); });  // later they hardly move
    if (changed < 1e-4) break;
  }
  return lean;
}

BinarizedWeight finish_lean(const LeanWeight& lean) {
  BinarizedWeight result;
  result.nm = lean.nm;
  result.levels = static_cast<int>(lean.level_values.size());
  result.column_block = lean.column_block;
  result.scale_bits = lean.scale_bits;
  result.symbols = lean.symbols.t().contiguous().cpu();
  if (lean.scale_bits == 16) {
    result.scales = lean.scales.t().contiguous().unsqueeze(2);
  } else {
    result.scale_codes = lean.scale_codes.t().contiguous();
    result.row_scales = lean.row_scales;
    result.level_values = at::tensor(lean.level_values, at::kFloat);
    result.expand_scales();
  }
  return result;
}

}  // namespace

BinarizedWeight quantize_linear(const at::Tensor& weight, const InputStats& stats, const Recipe& recipe,
                                LinearReport* report) {
  const double started = seconds_now();
  LinearReport local;
  LinearReport& out = report ? *report : local;
  const at::Tensor w = weight.to(at::kCPU, at::kFloat);
  STBLLM_CHECK(stats.hessian.size(0) == w.size(1), "H has {} columns, the weight {}", stats.hessian.size(0),
               w.size(1));
  const at::Tensor weight_t = w.t().contiguous();
  std::vector<int64_t> outliers;
  BinarizedWeight result;
  if (recipe.lean()) {
    double shrink = recipe.shrink;
    if (shrink < 0) {
      shrink = 0.3;  // without held-out windows: the middle of what they choose on real layers
      if (stats.holdout_hessian.defined()) {
        const StageTimer timer("shrink choice");
        double best = INFINITY;
        for (const double candidate : {0.03, 0.1, 0.3, 0.6}) {
          const auto metric = code_metric(stats, recipe, candidate);
          const LeanWeight trial = optimize_lean(weight_t, *metric, std::min(recipe.descend, 1), recipe, out);
          at::Tensor holdout = stats.holdout_hessian.clone();
          if (!metric->outliers.empty()) zero_columns(holdout, metric->outliers);
          const double error = relative_output_error(weight_t.t(), trial.dense().t(), holdout);
          if (error < best) best = error, shrink = candidate;
        }
      }
    }
    out.shrink = shrink;
    const auto metric = code_metric(stats, recipe, shrink);
    outliers = metric->outliers;
    result = finish_lean(optimize_lean(weight_t, *metric, recipe.descend, recipe, out));
  } else {
    outliers = find_outliers(stats.hessian, recipe.outlier_share, recipe.max_outliers);
    result =
        quantize_by_regions(weight_t, stats.hessian, stats.feature_norm_sq().cpu(), outliers, recipe, out);
  }
  if (!outliers.empty()) {
    const at::Tensor outlier_columns = at::tensor(outliers, at::kLong);
    result.outlier_columns = outlier_columns.to(at::kInt);
    result.outlier_values = round_to_half(w.index_select(1, outlier_columns)).t().contiguous();
    // The codes at these columns do not count; one fixed symbol keeps the bytes canonical.
    at::Tensor symbols = result.symbols.index_select(1, outlier_columns);
    result.symbols.index_copy_(1, outlier_columns, symbols.ne(0).to(at::kChar));
  }
  const int hessians = stats.holdout_hessian.defined() ? 2 : 1;
  const StageTimer timer("errors", hessians * output_error_flops(w.size(0), w.size(1)));
  const at::Tensor dense = result.to_dense();
  out.output_error = relative_output_error(w, dense, stats.hessian);
  if (stats.holdout_hessian.defined())
    out.holdout_error = relative_output_error(w, dense, stats.holdout_hessian);
  out.seconds = seconds_now() - started;
  return result;
}

}  // namespace stbllm
