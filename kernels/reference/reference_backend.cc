// y[t][r] = sum_c x[t][c] W[r][c], in double precision over the weights of StructuredBinaryMatrix::at().
// Slow and plain on purpose: every other backend is tested against this one.

#include <cstdint>
#include <vector>

#include "stbllm/backend/activations.h"
#include "stbllm/backend/builtin.h"

namespace stbllm {
namespace {

class ReferenceMatrix : public PreparedMatrix {
 public:
  explicit ReferenceMatrix(StructuredBinaryMatrix matrix) : matrix_(std::move(matrix)) {}
  int64_t bytes() const override { return matrix_.bytes(); }
  const StructuredBinaryMatrix& matrix() const { return matrix_; }

 private:
  StructuredBinaryMatrix matrix_;
};

class ReferenceBackend : public Backend {
 public:
  std::string_view name() const override { return "reference"; }

  std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const override {
    return std::make_unique<ReferenceMatrix>(matrix);
  }

  void matmul(const PreparedMatrix& prepared, const ActivationView& x, const ActivationView& y,
              void*) const override {
    const StructuredBinaryMatrix& matrix = dynamic_cast<const ReferenceMatrix&>(prepared).matrix();
    const int64_t rows = matrix.layout().rows, cols = matrix.layout().cols;
    check_activations(rows, cols, x, y);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<double> weights(static_cast<size_t>(cols));
      for (int64_t col = 0; col < cols; ++col) weights[col] = matrix.at(row, col);
      for (int64_t token = 0; token < x.tokens; ++token) {
        double sum = 0.0;
        for (int64_t col = 0; col < cols; ++col) sum += weights[col] * load_element(x, token * cols + col);
        store_element(y, token * rows + row, static_cast<float>(sum));
      }
    }
  }
};

}  // namespace

const Backend& reference_backend() {
  static const ReferenceBackend backend;
  return backend;
}

}  // namespace stbllm
