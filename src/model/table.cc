#include "stbllm/model/table.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <vector>

#include "stbllm/base/error.h"
#include "stbllm/model/linear.h"

namespace stbllm {

at::Tensor dense_rows(const QuantizedRows& rows) {
  const auto& [count, cols, bits] = rows.layout();
  at::Tensor dense = at::empty({count, cols}, at::kFloat);
  constexpr int64_t kRowsPerTask = 64;
  float* out = dense.data_ptr<float>();
  at::parallel_for(0, count, kRowsPerTask, [&, cols = cols](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) rows.decode_row(row, out + row * cols);
  });
  return dense;
}

at::Tensor Table::look_up(const at::Tensor& ids, at::ScalarType dtype, at::Device device) const {
  if (dense_.defined()) return at::embedding(dense_, ids.to(device));
  const at::Tensor flat = ids.flatten().to(at::kCPU, at::kLong).contiguous();
  const int64_t cols = rows_.layout().cols;
  const at::Tensor found = at::empty({flat.numel(), cols}, at::kFloat);
  for (int64_t i = 0; i < flat.numel(); ++i) {
    const int64_t id = flat.const_data_ptr<int64_t>()[i];
    STBLLM_CHECK(id >= 0 && id < rows_.layout().rows, "token id {} in a table of {} rows", id,
                 rows_.layout().rows);
    rows_.decode_row(id, found.data_ptr<float>() + i * cols);
  }
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(cols);
  return found.view(shape).to(device, dtype);
}

at::Tensor Table::multiply(const at::Tensor& x) const {
  if (dense_.defined()) return at::linear(x, dense_);
  const QuantizedRows::Layout& layout = rows_.layout();
  STBLLM_CHECK(x.size(-1) == layout.cols, "input width {}, rows of {}", x.size(-1), layout.cols);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = layout.rows;
  const at::Tensor input = x.contiguous(), y = at::empty(shape, x.options().dtype(at::kFloat));
  backend_->matmul(*prepared_, view_of(input), view_of(y), stream_of(x));
  return y;
}

int64_t Table::bytes() const {
  return dense_.defined()       ? static_cast<int64_t>(dense_.nbytes())
         : prepared_ != nullptr ? prepared_->bytes()
                                : 0;
}

}  // namespace stbllm
