// y[t][r] = sum_c x[t][c] W[r][c], in double precision over the weights of StructuredBinaryMatrix::at(), or
// over decoded rows of integers. It is slow and plain on purpose: every other backend is tested against this
// one.

#include <cstdint>
#include <functional>
#include <vector>

#include "stbllm/backend/activations.h"
#include "stbllm/backend/builtin.h"
#include "stbllm/base/parallel.h"

namespace stbllm {
namespace {

struct ReferenceMatrix : public PreparedMatrix {
  ReferenceMatrix(int64_t rows, int64_t cols, int64_t bytes, std::function<void(int64_t, float*)> decode_row)
      : rows(rows), cols(cols), held(bytes), decode_row(std::move(decode_row)) {}
  int64_t bytes() const override { return held; }

  int64_t rows, cols, held;
  std::function<void(int64_t row, float* weights)> decode_row;
};

class ReferenceBackend : public Backend {
 public:
  std::string_view name() const override { return "reference"; }

  std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const override {
    const Layout& layout = matrix.layout();
    return std::make_unique<ReferenceMatrix>(layout.rows, layout.cols, matrix.bytes(),
                                             [matrix](int64_t row, float* weights) {
                                               for (int64_t col = 0; col < matrix.layout().cols; ++col)
                                                 weights[col] = matrix.at(row, col);
                                             });
  }
  std::unique_ptr<PreparedMatrix> prepare_rows(const QuantizedRows& rows) const override {
    return std::make_unique<ReferenceMatrix>(
        rows.layout().rows, rows.layout().cols, rows.bytes(),
        [rows](int64_t row, float* weights) { rows.decode_row(row, weights); });
  }

  void matmul(const PreparedMatrix& prepared, const ActivationView& x, const ActivationView& y,
              void*) const override {
    const auto& matrix = dynamic_cast<const ReferenceMatrix&>(prepared);
    const int64_t rows = matrix.rows, cols = matrix.cols;
    check_activations(rows, cols, x, y);
    parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> weights(static_cast<size_t>(cols));
      for (int64_t row = begin; row < end; ++row) {
        matrix.decode_row(row, weights.data());
        for (int64_t token = 0; token < x.tokens; ++token) {
          double sum = 0.0;
          for (int64_t col = 0; col < cols; ++col)
            sum += double{weights[col]} * load_element(x, token * cols + col);
          store_element(y, token * rows + row, static_cast<float>(sum));
        }
      }
    });
  }
};

}  // namespace

const Backend& reference_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace stbllm
