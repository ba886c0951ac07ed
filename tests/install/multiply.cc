// Reads a packed file and multiplies one of its matrices with a vector of ones: multiply FILE LINEAR
//
// Prints the sums of the matrix's rows. STBLLM_BACKEND=reference|cpu-generic|... chooses the kernels.

#include <cstdio>
#include <exception>
#include <vector>

#include "stbllm/backend/backend.h"
#include "stbllm/pack/packed_file.h"

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s FILE LINEAR\n", argv[0]);
    return 2;
  }
  const auto file = stbllm::PackedReader::open(argv[1]);
  const stbllm::StructuredBinaryMatrix& matrix = file.linears().at(argv[2]);
  const int64_t rows = matrix.layout().rows, cols = matrix.layout().cols;

  const stbllm::Backend& backend = stbllm::find_backend("auto");
  const auto prepared = backend.prepare(matrix);  // repacks the file's planes for the kernels
  std::vector<float> x(cols, 1.0f), y(rows);
  backend.matmul(*prepared, {.data = x.data(), .tokens = 1, .width = cols},
                 {.data = y.data(), .tokens = 1, .width = rows});

  for (const float value : y) std::printf("%.4f\n", value);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
