// The method of the papers, in host memory: a support by importance, salient columns, regions by magnitude,
// and compensation from column block to column block.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>

#include "methods.h"
#include "stbllm/base/bits.h"
#include "stbllm/quantize/binarize.h"
#include "stbllm/quantize/compensate.h"
#include "stbllm/quantize/nm_select.h"

namespace stbllm {
namespace {

/// The region search tries this many thresholds between these quantiles of the magnitudes, as the released
/// code does.
constexpr int kThresholds = 160;
constexpr float kLowestQuantile = 0.10f, kHighestQuantile = 0.90f;

/// Sorts values that are not negative: their bits are in the order of their values, so that three passes over
/// 11-bit digits do.
void sort_magnitudes(std::vector<float>& values) {
  constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;
  std::vector<float> other(values.size());
  for (int shift = 0; shift < 3 * kDigitBits; shift += kDigitBits) {
    const auto digit = [&](float x) { return std::bit_cast<uint32_t>(x) >> shift & (kDigits - 1); };
    std::array<size_t, kDigits> place{};
    for (const float x : values) ++place[digit(x)];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), size_t{0});
    for (const float x : values) other[place[digit(x)]++] = x;
    values.swap(other);
  }
}

/// numpy.quantile of float32 values at float32 positions: index, fraction and interpolation are float32 too,
/// and many weights of a checkpoint are equal, so that a threshold often falls exactly on one of them.
std::vector<float> quantiles(std::vector<float> values) {
  sort_magnitudes(values);
  std::vector<float> result(kThresholds);
  const at::Tensor grid = at::linspace(kLowestQuantile, kHighestQuantile, kThresholds, at::kFloat);
  for (int i = 0; i < kThresholds; ++i) {
    const float position = grid.data_ptr<float>()[i] * static_cast<float>(values.size() - 1);
    const auto below = static_cast<size_t>(position);
    const float a = values[below], b = values[std::min(below + 1, values.size() - 1)];
    const float t = position - std::floor(position);
    result[i] = t < 0.5f ? a + (b - a) * t : b - (b - a) * (1 - t);
  }
  return result;
}

/// One linear on its way through the method, column block by column block. Everything is transposed, (cols,
/// rows).
class RegionQuantizer {
 public:
  RegionQuantizer(const at::Tensor& weight_t, const InputStats& stats, const RegionMethod& method,
                  const Scheme& scheme, LinearReport& report)
      : method_(method),
        scheme_(scheme),
        released_(method.arithmetic == Arithmetic::kReleased),
        report_(report),
        cols_(weight_t.size(0)),
        rows_(weight_t.size(1)),
        work_(weight_t.clone().index_fill_(0, dead_columns(stats.hessian), 0)),
        norm_sq_(stats.feature_norm_sq().cpu()),
        importance_(work_, method.importance) {
    factor(stats.hessian);
    // The released code prunes the whole layer first and then forgets the mask: pruned weights are zeros that
    // take part.
    if (released_) work_.mul_(nm_mask(importance_(work_, norm_sq_, diagonal_), scheme.nm));
    symbols_ = at::zeros({cols_, rows_}, at::kChar);
    scales_ = at::zeros({rows_, ceil_div(cols_, method.column_block), scheme.levels + 2}, at::kFloat);
    if (released_) dense_ = at::zeros({cols_, rows_}, at::kFloat);
  }

  BinarizedWeight run() {
    for (int64_t start = 0; start < cols_; start += method_.column_block) quantize_block(start);
    return finish();
  }

 private:
  void factor(const at::Tensor& hessian) {
    // In float32 the rounding of a Cholesky depends on the number of threads: only the released arithmetic
    // needs it. It inverts the whole matrix and factors again.
    const InverseFactor factor = inverse_factor(hessian, method_.damping, /*three_steps=*/released_);
    report_.damping = factor.damping;
    report_.damping_retries = factor.retries;
    upper_ = factor.upper.cpu();
    diagonal_ = upper_.diagonal().contiguous();
  }

  void quantize_block(int64_t start) {
    const int64_t width = std::min<int64_t>(method_.column_block, cols_ - start);
    const at::Tensor w = work_.narrow(0, start, width).contiguous();
    const at::Tensor d = diagonal_.narrow(0, start, width);
    const at::Tensor kept = timed("mask", 0, [&] {
      return released_
                 ? at::ones({width, rows_}, at::kByte)
                 : nm_mask(importance_(w, norm_sq_.narrow(0, start, width), d).contiguous(), scheme_.nm);
    });
    const at::Tensor saliency = w.square() / d.square().unsqueeze(1);
    const ColumnBlock search{
        .values = released_ ? saliency : w,
        .kept = kept,
        .weight = released_ ? at::ones({width}, at::kFloat) : d.square().reciprocal().contiguous()};
    const std::vector<uint8_t> salient = choose_salient(search, saliency);
    const float threshold = choose_threshold(search, salient);
    const at::Tensor sets = assign_sets(search, salient, threshold, scheme_.levels);
    BinarizedBlock fit =
        timed("binarize", 0, [&] { return binarize_sets(w, sets, scheme_.levels, /*means=*/released_); });
    if (!released_) fit.scale = round_to_half(fit.scale);
    const at::Tensor q = timed("dequantize", 0, [&] { return fit.dequantize(sets, scheme_.levels); });
    if (released_)
      dense_.narrow(0, start, width).copy_(q);
    else
      store(start, sets, salient, fit);
    if (method_.compensate == Compensate::kBlock) push_error(start, (w - q) / d.unsqueeze(1));
  }

  /// 1 for the salient columns of a block.
  std::vector<uint8_t> choose_salient(const ColumnBlock& search, const at::Tensor& saliency) {
    std::vector<uint8_t> salient(saliency.size(0), 0);
    if (method_.max_salient > 0) {
      const at::Tensor total = (saliency * search.kept).sum(1);
      const float* sum = total.data_ptr<float>();
      std::vector<int64_t> order(salient.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return sum[x] > sum[y]; });
      // Differs from STBLLM: the released code tries 1..49 and binarizes the rest with order 2 during this
      // search.
      const int least = released_ ? 1 : 0, most = released_ ? method_.max_salient - 1 : method_.max_salient;
      const StageTimer timer("salient search");
      const int count = search_salient(search, order, least, most, /*rest_order=*/released_ ? 2 : 1,
                                       /*means=*/released_);
      for (int i = 0; i < count; ++i) salient[order[i]] = 1;
    }
    report_.salient_count.push_back(static_cast<int>(std::count(salient.begin(), salient.end(), 1)));
    return salient;
  }

  /// p1, the smallest magnitude of the second region; 0 where there is one region.
  float choose_threshold(const ColumnBlock& search, const std::vector<uint8_t>& salient) {
    if (scheme_.levels == 1) return 0;
    std::vector<float> magnitudes;
    magnitudes.reserve(search.values.numel());
    const float* value = search.values.const_data_ptr<float>();
    const uint8_t* kept = search.kept.const_data_ptr<uint8_t>();
    for (size_t c = 0; c < salient.size(); ++c)
      for (int64_t row = 0; row < rows_; ++row, ++value, ++kept) {
        if (!released_ && (salient[c] || !*kept)) continue;
        magnitudes.push_back(salient[c] ? 0.f : std::fabs(*value));
      }
    float threshold = 0;
    if (!magnitudes.empty()) {
      const StageTimer timer("region search");
      threshold = search_regions(search, salient, quantiles(std::move(magnitudes)), scheme_.levels,
                                 /*means=*/released_, /*upper_quantile_rule=*/released_);
    }
    report_.threshold.push_back(threshold);
    return threshold;
  }

  void store(int64_t start, const at::Tensor& sets, const std::vector<uint8_t>& salient,
             const BinarizedBlock& fit) {
    // Symbols are +-(1 + level); salient columns are of level 0.
    const at::Tensor level = at::where(sets.eq(kSalientSet), at::ones_like(sets), sets).to(at::kChar);
    symbols_.narrow(0, start, sets.size(0)).copy_(fit.sign * level);
    scales_.select(1, start / method_.column_block).copy_(fit.scale);
    for (int64_t c = 0; c < sets.size(0); ++c)
      if (salient[c]) {
        salient_columns_.push_back(static_cast<int32_t>(start + c));
        // Pruned weights of a salient column have no residual; any sign will do.
        const at::Tensor sign = fit.residual_sign[c];
        salient_signs_.push_back(at::where(sign.eq(0), at::ones_like(sign), sign));
      }
  }

  /// error: (cols of the block, rows), divided by the diagonal.
  void push_error(int64_t start, const at::Tensor& error) {
    const int64_t width = error.size(0), end = start + width, rest = cols_ - end;
    if (rest == 0) return;
    const StageTimer timer("compensate", 2.0 * static_cast<double>(rows_ * width * rest));
    work_.narrow(0, end, rest)
        .addmm_(upper_.narrow(0, start, width).narrow(1, end, rest).t(), error, /*beta=*/1, /*alpha=*/-1);
  }

  BinarizedWeight finish() {
    BinarizedWeight result;
    result.nm = scheme_.nm;
    result.levels = scheme_.levels;
    result.column_block = method_.column_block;
    result.scale_bits = 16;
    if (released_) {
      result.unpackable = dense_.t().contiguous();
      return result;
    }
    result.symbols = symbols_.t().contiguous();
    result.scales = salient_columns_.empty() ? scales_.narrow(2, 0, scheme_.levels).contiguous() : scales_;
    if (!salient_columns_.empty()) {
      result.salient_columns = at::tensor(salient_columns_, at::kInt);
      result.salient_signs = at::stack(salient_signs_);
    }
    return result;
  }

  const RegionMethod& method_;
  const Scheme scheme_;
  const bool released_;
  LinearReport& report_;
  const int64_t cols_, rows_;
  at::Tensor work_;     // (cols, rows): weights with the errors of earlier blocks
  at::Tensor norm_sq_;  // (cols): S_j^2
  ImportanceScore importance_;
  at::Tensor upper_, diagonal_;  // U with H^-1 = U^T U, and d_j
  at::Tensor symbols_;           // int8 (cols, rows)
  at::Tensor scales_;            // (rows, column blocks, levels + 2)
  at::Tensor dense_;             // (cols, rows): the result of the released arithmetic
  std::vector<int32_t> salient_columns_;
  std::vector<at::Tensor> salient_signs_;
};

}  // namespace

BinarizedWeight quantize_by_regions(const at::Tensor& weight_t, const InputStats& stats,
                                    const RegionMethod& method, const Scheme& scheme, LinearReport& report) {
  return RegionQuantizer(weight_t, stats, method, scheme, report).run();
}

}  // namespace stbllm
