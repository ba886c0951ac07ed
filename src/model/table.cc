#include "stbllm/model/table.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/lanes.h"
#include "stbllm/model/linear.h"

namespace stbllm {
namespace {

/// Up to so many tokens multiply integers; for more, rows are decoded once for all.
constexpr int64_t kFewTokens = 8;
/// Rows that are decoded at a time: a few MB, which stay in the cache until they are multiplied.
constexpr int64_t kDecodedRows = 1024;
constexpr int kVectors = QuantizedRows::kColumnBlock / kLanes;

/// One block of 64 columns as integers; lane j of vector k is column 4 j + k.
template <int Bits>
STBLLM_INLINE void load_block(const std::byte* codes, Lanes (&q)[kVectors]) {
  if constexpr (Bits == 8) {
    IntLanes bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    for (int k = 0; k < kVectors; ++k) q[k] = __builtin_convertvector(signed_bytes_of(bytes, k), Lanes);
  } else {
    WordLanes words;
    std::memcpy(&words, codes, sizeof words);
    for (int k = 0; k < kVectors; ++k) q[k] = __builtin_convertvector(nibbles_of(words, k) - 8, Lanes);
  }
}

/// Activations in that order, and zeros behind the last column: (blocks * 64).
void arrange(const float* x, int64_t cols, float* arranged) {
  constexpr int64_t kBlock = QuantizedRows::kColumnBlock;
  std::fill_n(arranged, ceil_div(cols, kBlock) * kBlock, 0.f);
  for (int64_t c = 0; c < cols; ++c) arranged[c / kBlock * kBlock + c % kVectors * kLanes + c % kBlock / kVectors] = x[c];
}

/// Dot products of one row of integers with `tokens` <= kFewTokens arranged activations, each `width` long.
template <int Bits>
STBLLM_INLINE void dot_row(const std::byte* codes, const float* scales, int64_t blocks, int64_t code_bytes, const float* x, int64_t width,
                           int64_t tokens, float* y, int64_t y_stride) {
  constexpr int64_t kBlockBytes = QuantizedRows::kColumnBlock * Bits / 8;
  Lanes sums[kFewTokens] = {};
  for (int64_t block = 0; block < blocks; ++block) {
    Lanes q[kVectors];
    const int64_t first = block * kBlockBytes;
    if (first + kBlockBytes <= code_bytes) {
      load_block<Bits>(codes + first, q);
    } else {  // what lies behind the last column meets zeros
      std::byte last[kBlockBytes] = {};
      std::memcpy(last, codes + first, static_cast<size_t>(code_bytes - first));
      load_block<Bits>(last, q);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const float* from = x + t * width + block * QuantizedRows::kColumnBlock;
      Lanes product = q[0] * load_lanes(from);
      for (int v = 1; v < kVectors; ++v) product += q[v] * load_lanes(from + v * kLanes);
      sums[t] += product * scales[block];
    }
  }
  for (int64_t t = 0; t < tokens; ++t) y[t * y_stride] = sum_of(sums[t]);
}

/// Rows [begin, end) for a few tokens.
struct FewTokens {
  const QuantizedRows::Layout& layout;
  const std::byte* codes;
  const float* scales;
  const float* x;
  int64_t width, tokens;
  float* y;
};
template <int Bits>
STBLLM_INLINE void dot_rows_of(const FewTokens& few, int64_t begin, int64_t end) {
  const int64_t blocks = few.layout.column_blocks(), bytes = few.layout.code_row_bytes();
  for (int64_t row = begin; row < end; ++row) {
    const std::byte* codes = few.codes + row * bytes;
    if (few.tokens == 1)  // a constant, for the usual case
      dot_row<Bits>(codes, few.scales + row * blocks, blocks, bytes, few.x, few.width, 1, few.y + row, few.layout.rows);
    else
      dot_row<Bits>(codes, few.scales + row * blocks, blocks, bytes, few.x, few.width, few.tokens, few.y + row, few.layout.rows);
  }
}
STBLLM_CLONES void dot_rows_8(const FewTokens& few, int64_t begin, int64_t end) { dot_rows_of<8>(few, begin, end); }
STBLLM_CLONES void dot_rows_4(const FewTokens& few, int64_t begin, int64_t end) { dot_rows_of<4>(few, begin, end); }

}  // namespace

Table::Table(QuantizedRows rows) : rows_(std::move(rows)) {
  const QuantizedRows::Layout& layout = rows_.layout();
  scales_ = at::empty({layout.rows, layout.column_blocks()}, at::kFloat);
  for (int64_t i = 0; i < scales_.numel(); ++i) {
    uint16_t half;
    std::memcpy(&half, rows_.scales().data() + 2 * i, sizeof half);
    scales_.data_ptr<float>()[i] = half_to_float(half);
  }
}

at::Tensor Table::look_up(const at::Tensor& ids, at::ScalarType dtype) const {
  if (dense_.defined()) return at::embedding(dense_, ids);
  const at::Tensor flat = ids.flatten().to(at::kLong).contiguous();
  const int64_t cols = rows_.layout().cols;
  const at::Tensor found = at::empty({flat.numel(), cols}, at::kFloat);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const int64_t id = flat.const_data_ptr<int64_t>()[i];
    STBLLM_CHECK(id >= 0 && id < rows_.layout().rows, "token id {} in a table of {} rows", id, rows_.layout().rows);
    rows_.decode_row(id, found.data_ptr<float>() + i * cols);
  }
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(cols);
  return found.view(shape).to(dtype);
}

at::Tensor Table::multiply(const at::Tensor& x) const {
  if (dense_.defined()) return at::linear(x, dense_);
  STBLLM_CHECK(x.size(-1) == rows_.layout().cols, "input width {}, rows of {}", x.size(-1), rows_.layout().cols);
  const at::Tensor flat = x.reshape({-1, x.size(-1)});
  const at::Tensor y = flat.size(0) <= kFewTokens ? multiply_few(flat.to(at::kFloat).contiguous())
                                                  : multiply_many(flat, x.scalar_type() == at::kFloat ? at::kFloat : fast_product_dtype());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = rows_.layout().rows;
  return y.view(shape);
}

at::Tensor Table::multiply_few(const at::Tensor& x) const {
  const QuantizedRows::Layout& layout = rows_.layout();
  const int64_t tokens = x.size(0), width = layout.column_blocks() * QuantizedRows::kColumnBlock;
  std::vector<float> arranged(static_cast<size_t>(tokens * width));
  for (int64_t t = 0; t < tokens; ++t) arrange(x.const_data_ptr<float>() + t * layout.cols, layout.cols, &arranged[static_cast<size_t>(t * width)]);
  const at::Tensor y = at::empty({tokens, layout.rows}, at::kFloat);
  const FewTokens few{layout, rows_.codes().data(), scales_.const_data_ptr<float>(), arranged.data(), width, tokens, y.data_ptr<float>()};
  const auto dot_rows = layout.bits == 8 ? dot_rows_8 : dot_rows_4;
  at::parallel_for(0, layout.rows, 256, [&](int64_t begin, int64_t end) { dot_rows(few, begin, end); });
  return y;
}

at::Tensor Table::multiply_many(const at::Tensor& x, at::ScalarType product_dtype) const {
  const QuantizedRows::Layout& layout = rows_.layout();
  const at::Tensor input = x.to(product_dtype), y = at::empty({x.size(0), layout.rows}, at::kFloat);
  const at::Tensor decoded = at::empty({std::min(kDecodedRows, layout.rows), layout.cols}, at::kFloat);
  for (int64_t first = 0; first < layout.rows; first += kDecodedRows) {
    const int64_t count = std::min(kDecodedRows, layout.rows - first);
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) rows_.decode_row(first + row, decoded.data_ptr<float>() + row * layout.cols);
    });
    const at::Tensor weight = decoded.narrow(0, 0, count);
    at::Tensor part = y.narrow(1, first, count);
    if (product_dtype == at::kFloat)
      at::mm_out(part, input, weight.t());
    else
      part.copy_(at::linear(input, weight.to(product_dtype)));
  }
  return y;
}

int64_t Table::bytes() const {
  return dense_.defined() ? static_cast<int64_t>(dense_.nbytes()) : scales_.defined() ? rows_.bytes() + static_cast<int64_t>(scales_.nbytes()) : 0;
}

}  // namespace stbllm
