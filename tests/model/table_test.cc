// The tables at both ends: quantized rows give what their decoded rows give.

#include "stbllm/model/table.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "support/threads.h"

namespace stbllm {
namespace {

struct Rows {
  QuantizedRows coded;
  at::Tensor decoded;
};

/// 1500 rows: the last tile of 64 is not full.
Rows make_rows(int bits, int64_t cols, int64_t rows = 1500) {
  at::manual_seed(3);
  const at::Tensor weight = at::randn({rows, cols});
  const auto load = [&](int64_t row, float* out) {
    std::memcpy(out, weight[row].data_ptr<float>(), static_cast<size_t>(cols) * sizeof(float));
  };
  Rows result{QuantizedRows::encode({.rows = rows, .cols = cols, .bits = bits}, load, "rows"),
              at::empty({rows, cols})};
  for (int64_t row = 0; row < rows; ++row)
    result.coded.decode_row(row, result.decoded[row].data_ptr<float>());
  return result;
}

Table table_of(const Rows& rows) {
  const Backend& backend = find_backend("cpu");
  return {rows.coded, backend, backend.prepare_rows(rows.coded)};
}

/// Columns that fill blocks of 64, half a block, and end in the middle of a byte of 4-bit codes.
const std::vector<int64_t> kWidths = {128, 96, 75};

TEST(Table, LooksUpDecodedRows) {
  for (const int bits : {8, 4})
    for (const int64_t cols : kWidths) {
      const Rows rows = make_rows(bits, cols);
      const Table table = table_of(rows);
      const at::Tensor ids = at::tensor({7, 0, 1499, 7, 64, 3}, at::kInt).view({2, 3});
      EXPECT_TRUE(table.look_up(ids, at::kFloat).equal(at::embedding(rows.decoded, ids)));
      EXPECT_TRUE(table.look_up(ids.to(at::kLong), at::kFloat).equal(at::embedding(rows.decoded, ids)));
      EXPECT_TRUE(
          table.look_up(ids, at::kBFloat16).equal(at::embedding(rows.decoded, ids).to(at::kBFloat16)));
      for (const int id : {1500, -1})
        EXPECT_THROW(table.look_up(at::tensor({id}, at::kInt), at::kFloat), std::logic_error);
      EXPECT_THROW(table.multiply(at::zeros({1, cols + 1})), std::logic_error);
    }
}

TEST(Table, MultipliesByDecodedRows) {
  const at::NoGradGuard no_grad;
  for (const int bits : {8, 4})
    for (const int64_t cols : kWidths)
      for (const int64_t tokens : {1, 2, 8, 9, 40})
        for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
          const Rows rows = make_rows(bits, cols);
          const Table table = table_of(rows);
          at::manual_seed(5);
          const at::Tensor x = at::randn({tokens, cols}).to(dtype),
                           exact = at::mm(x.to(at::kDouble), rows.decoded.to(at::kDouble).t());
          const at::Tensor y = table.multiply(x.unsqueeze(0)).squeeze(0);
          // float32 sums of `cols` products in some order; of many tokens in bfloat16 some backends round
          // activations to 2^-15 of the largest of 64, normal ones here: less than 2^-12 of the sum of
          // magnitudes.
          const double unit =
              dtype == at::kBFloat16 && tokens > 8 ? 0x1p-12 : static_cast<double>(cols + 2) * 0x1p-24;
          const at::Tensor bound =
              at::mm(x.to(at::kDouble).abs(), rows.decoded.to(at::kDouble).abs().t()) * unit;
          EXPECT_TRUE((y.to(at::kDouble) - exact).abs().le(bound).all().item<bool>())
              << bits << " bits, " << cols << " columns, " << tokens << " tokens, " << at::toString(dtype);
        }
}

TEST(Table, GivesTheSameBytesForAnyNumberOfThreads) {
  const at::NoGradGuard no_grad;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16})
    for (const int64_t tokens : {1, 6, 20}) {
      std::vector<at::Tensor> results;
      for (const int threads : {1, 3}) {
        const test::Threads scope(threads);
        const Rows rows = make_rows(8, 96);
        at::manual_seed(6);
        results.push_back(table_of(rows).multiply(at::randn({tokens, 96}).to(dtype)));
      }
      EXPECT_TRUE(results[0].equal(results[1])) << tokens << " tokens, " << at::toString(dtype);
    }
}

TEST(Table, HoldsNoMoreThanTheFileAndItsScales) {
  const Rows rows = make_rows(8, 128);
  EXPECT_EQ(table_of(rows).bytes(), rows.coded.bytes() + 2 * 1536 * 2);
  EXPECT_FALSE(table_of(rows).dense().defined());
}

}  // namespace
}  // namespace stbllm
