#include "stbllm/quantize/round_rows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "methods.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"
#include "stbllm/base/profile.h"
#include "stbllm/quantize/compensate.h"

namespace stbllm {
namespace {

/// Rows that are in work at a time, as columns of tensors: enough for products at full speed.
constexpr int64_t kRowsAtOnce = 4096;
/// Columns whose errors reach the later ones together.
constexpr int64_t kPanel = 64;
/// More than for linears: the table of a tied head is looked up as well, where plain squared errors count.
constexpr double kShrink = 0.3, kDamping = 0.01;

/// The scales (1, rows) of a block of columns (block, rows), whose squared errors count column_weight (block,
/// 1): those of a few steps around what the largest weight asks for, each then fitted to its integers. The
/// lowest integer has no positive twin, so that the sign of the scale sends the largest weight there.
at::Tensor search_scales(const at::Tensor& weights, const at::Tensor& column_weight, int lowest,
                         int highest) {
  constexpr int kSteps = 9;
  constexpr double kFirst = 0.6, kLast = 1.2;
  const at::Tensor largest = weights.gather(0, weights.abs().argmax(0, /*keepdim=*/true));
  at::Tensor best, least;
  for (int step = 0; step < kSteps; ++step) {
    const double factor = kFirst + (kLast - kFirst) * step / (kSteps - 1);
    const at::Tensor wanted = largest * (factor / lowest);
    // Zeros ask for the scale 0; any divisor keeps their integers at 0.
    const at::Tensor q = (weights / wanted.masked_fill(wanted.eq(0), 1)).round_().clamp_(lowest, highest);
    const at::Tensor weighted = q * column_weight;
    const at::Tensor scale = round_to_half((weighted * weights).sum(0, /*keepdim=*/true) /
                                           (weighted * q).sum(0, /*keepdim=*/true).clamp_min(1e-30));
    const at::Tensor error = ((weights - q * scale).square_() * column_weight).sum(0, /*keepdim=*/true);
    best = step == 0 ? scale : at::where(error < least, scale, best);
    least = step == 0 ? error : at::minimum(error, least);
  }
  return best;
}

/// Some rows of a table, transposed.
class RowRounder {
 public:
  RowRounder(int bits, int64_t column_block, const at::Tensor& hessian)
      : lowest_(-(1 << (bits - 1))), highest_(-lowest_ - 1), column_block_(column_block) {
    const at::Tensor h = shrink_hessian(hessian, kShrink);
    order_ = h.diagonal().argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
    upper_ = inverse_factor(h.index_select(0, order_).index_select(1, order_), kDamping).upper;
    column_weight_ = at::empty({h.size(0), 1}, at::kFloat);
    column_weight_.index_copy_(0, order_, upper_.diagonal().square().reciprocal().unsqueeze(1));
  }

  /// weights: (cols, rows) float32 -> integers (cols, rows) as float32 and scales (blocks, rows).
  std::pair<at::Tensor, at::Tensor> round(const at::Tensor& weights) const {
    const int64_t cols = weights.size(0);
    std::vector<at::Tensor> blocks;
    for (int64_t first = 0; first < cols; first += column_block_) {
      const int64_t width = std::min(column_block_, cols - first);
      blocks.push_back(search_scales(weights.narrow(0, first, width), column_weight_.narrow(0, first, width),
                                     lowest_, highest_));
    }
    const at::Tensor scales = at::cat(blocks), ordered = feed_back(weights, scales);
    return {at::empty_like(ordered).index_copy_(0, order_, ordered), scales};
  }

 private:
  /// The integers of all columns in the order of their energies.
  at::Tensor feed_back(const at::Tensor& weights, const at::Tensor& scales) const {
    const int64_t cols = weights.size(0);
    const at::Tensor targets = weights.index_select(0, order_), integers = at::empty_like(targets),
                     scale = scales.index_select(0, order_.div(column_block_, "floor"));
    // Integers under a scale of 0 are 0.
    const at::Tensor divisor = scale.masked_fill(scale.eq(0), std::numeric_limits<float>::infinity());
    for (int64_t first = 0; first < cols; first += kPanel) {
      const int64_t end = std::min(first + kPanel, cols);
      const at::Tensor errors = at::empty({end - first, weights.size(1)}, at::kFloat);
      for (int64_t j = first; j < end; ++j) {
        const at::Tensor q = integers[j].copy_(targets[j] / divisor[j]).round_().clamp_(lowest_, highest_);
        const at::Tensor error = errors[j - first].copy_(targets[j]).addcmul_(q, scale[j], -1);
        error.div_(upper_[j][j]);
        targets.narrow(0, j + 1, end - j - 1).addr_(upper_[j].narrow(0, j + 1, end - j - 1), error, 1, -1);
      }
      targets.narrow(0, end, cols - end)
          .addmm_(upper_.narrow(0, first, end - first).narrow(1, end, cols - end).t(), errors, 1, -1);
    }
    return integers;
  }

  int lowest_, highest_;
  int64_t column_block_;
  at::Tensor order_;          // (cols): of the columns, by their place in the order
  at::Tensor upper_;          // U of the ordered H
  at::Tensor column_weight_;  // (cols, 1): 1 / U_jj^2
};

}  // namespace

RoundedRows round_rows(const at::Tensor& table, int bits, int64_t column_block, const at::Tensor& hessian,
                       const std::string& what) {
  const StageTimer timer("tables");
  const RowRounder rounder(bits, column_block, hessian.cpu());
  const int64_t rows = table.size(0), cols = table.size(1);
  RoundedRows result{.integers = at::empty({rows, cols}, at::kChar),
                     .scales = at::empty({rows, ceil_div(cols, column_block)}, at::kHalf)};
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    check_interrupt();
    const int64_t count = std::min(kRowsAtOnce, rows - first);
    const auto [integers, scales] =
        rounder.round(table.narrow(0, first, count).to(at::kFloat).t().contiguous());
    if (!scales.isfinite().all().item<bool>())
      fail(ErrorCode::kUnsupported, "{}: rows {} to {}: expected finite weights of at most 400000", what,
           first, first + count - 1);
    result.integers.narrow(0, first, count).copy_(integers.t());
    result.scales.narrow(0, first, count).copy_(scales.t());
  }
  return result;
}

}  // namespace stbllm
