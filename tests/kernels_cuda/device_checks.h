#pragma once
// The cuda backend on a real device against StructuredBinaryMatrix::at(), without a test framework, so that a
// machine with nothing but the CUDA toolkit can run it, too.

#include <cuda_runtime_api.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/cuda/launch.h"
#include "stbllm/backend/activations.h"
#include "stbllm/backend/builtin.h"
#include "support/element_bytes.h"
#include "support/random_matrix.h"

namespace stbllm::test {

struct DeviceCase {
  Layout layout;
  int tokens = 1;
  ElementType type = ElementType::kFloat16;

  std::string str() const {
    return fmt::format(
        "{} x {}, {}, levels {}, column block {}, scale bits {}, salient {}, outliers {}, tokens {}, type {}",
        layout.rows, layout.cols, layout.nm.str(), layout.levels, layout.column_block, layout.scale_bits,
        layout.salient, layout.outliers, tokens, static_cast<int>(type));
  }
};

/// Cases of every N:M and number of levels, every kernel, tails of rows, columns and tokens, extra columns,
/// odd column blocks and scale codes.
inline std::vector<DeviceCase> device_cases() {
  std::vector<DeviceCase> cases;
  const auto add = [&](int64_t rows, int64_t cols, NmPattern nm, int levels, int tokens,
                       ElementType type) -> Layout& {
    Layout layout;
    layout.rows = rows;
    layout.cols = cols;
    layout.nm = nm;
    layout.levels = levels;
    cases.push_back({layout, tokens, type});
    return cases.back().layout;
  };
  constexpr ElementType kTypes[] = {ElementType::kFloat16, ElementType::kBFloat16, ElementType::kFloat32};
  for (const int group : {4, 8, 16})
    for (int keep = 1; keep <= group; ++keep)
      for (int levels = 1; levels <= 3; ++levels)
        for (const int tokens : {1, 9, 20, 70})
          add(50, 520, {keep, group}, levels, tokens, kTypes[levels - 1]);
  for (const int tokens : {1, 2, 7, 8, 16, 17, 64, 65, 128, 200})
    for (const ElementType type : kTypes) add(300, 1030, {2, 4}, 1, tokens, type).outliers = 5;
  for (const int64_t rows : {1, 16, 17, 129, 1000})
    for (const int64_t cols : {1, 63, 128, 257, 2048, 4096})
      add(rows, cols, {2, 4}, 1, 3, ElementType::kBFloat16);
  for (const int block : {8, 64, 120, 256})
    for (const int tokens : {2, 30}) {
      Layout& layout = add(100, 700, {4, 8}, 2, tokens, ElementType::kFloat16);
      layout.column_block = block;
      layout.salient = 33;
      layout.outliers = 18;
    }
  for (const int bits : {4, 5, 6})
    for (const int tokens : {2, 30})
      add(100, 700, {2, 4}, 3, tokens, ElementType::kFloat16).scale_bits = bits;
  return cases;
}

/// A few cases that run every kernel and every branch of it, for tools that slow a program down a lot.
inline std::vector<DeviceCase> few_device_cases() {
  std::vector<DeviceCase> cases;
  const auto add = [&](NmPattern nm, int levels, int tokens) -> Layout& {
    Layout layout;
    layout.rows = 50;
    layout.cols = 520;
    layout.nm = nm;
    layout.levels = levels;
    cases.push_back({layout, tokens, ElementType::kFloat16});
    return cases.back().layout;
  };
  for (const int tokens : {1, 9, 20, 70})
    for (const auto& [nm, levels] :
         {std::pair{NmPattern{2, 4}, 1}, {NmPattern{2, 4}, 3}, {NmPattern{5, 8}, 1}})
      add(nm, levels, tokens);
  for (const int tokens : {3, 40}) {
    Layout& extra = add({2, 4}, 1, tokens);
    extra.salient = 20;
    extra.outliers = 3;
    add({2, 4}, 3, tokens).scale_bits = 4;
    add({3, 8}, 1, tokens).column_block = 120;
  }
  return cases;
}

inline void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(fmt::format("cuda: {}", cudaGetErrorString(error)));
}

/// Empty when the device's mma and mma.sp agree with fragments.h.
inline std::string probe_device() {
  void* device = nullptr;
  int counts[2] = {-1, -1};
  check_cuda(cudaMalloc(&device, sizeof counts));
  check_cuda(cuda::launch_probe(static_cast<int*>(device), static_cast<int*>(device) + 1, nullptr));
  check_cuda(cudaMemcpy(counts, device, sizeof counts, cudaMemcpyDeviceToHost));
  check_cuda(cudaFree(device));
  return counts[0] == 0 ? ""
                        : fmt::format("{} probes are wrong, the first is number {}", counts[0], counts[1]);
}

/// Empty when every result is equal to the last bit: all products and sums of the case are exact in float32.
inline std::string compare_on_device(const DeviceCase& c) {
  const int64_t rows = c.layout.rows, cols = c.layout.cols, bytes = element_bytes(c.type);
  const StructuredBinaryMatrix matrix = random_matrix(c.layout, 11, Content::kExact);
  std::vector<std::byte> x(static_cast<size_t>(c.tokens * cols * bytes)),
      y(static_cast<size_t>(c.tokens * rows * bytes));
  const ActivationView host_x{x.data(), c.type, c.tokens, cols}, host_y{y.data(), c.type, c.tokens, rows};
  std::mt19937 rng(7);
  for (int64_t i = 0; i < c.tokens * cols; ++i)
    store_element(host_x, i, static_cast<float>(static_cast<int>(rng() % 9) - 4));

  const Backend& backend = cuda_backend();
  const auto prepared = backend.prepare(matrix);
  void *device_x = nullptr, *device_y = nullptr;
  check_cuda(cudaMalloc(&device_x, x.size()));
  check_cuda(cudaMalloc(&device_y, y.size()));
  check_cuda(cudaMemcpy(device_x, x.data(), x.size(), cudaMemcpyHostToDevice));
  check_cuda(cudaMemset(device_y, 0xff, y.size()));
  backend.matmul(*prepared, {device_x, c.type, c.tokens, cols}, {device_y, c.type, c.tokens, rows});
  check_cuda(cudaDeviceSynchronize());
  check_cuda(cudaMemcpy(y.data(), device_y, y.size(), cudaMemcpyDeviceToHost));
  check_cuda(cudaFree(device_x));
  check_cuda(cudaFree(device_y));

  std::vector<float> row(static_cast<size_t>(cols));
  std::byte expected_bytes[4];
  const ActivationView expected{expected_bytes, c.type, 1, 1};
  for (int64_t r = 0; r < rows; ++r) {
    matrix.decode_row(r, row.data());
    for (int token = 0; token < c.tokens; ++token) {
      double sum = 0.0;
      for (int64_t col = 0; col < cols; ++col)
        sum += static_cast<double>(row[col]) * load_element(host_x, token * cols + col);
      store_element(expected, 0, static_cast<float>(sum));
      const float found = load_element(host_y, token * rows + r);
      if (!(found == load_element(expected, 0)))
        return fmt::format("{}: row {}, token {}: expected {}, found {}", c.str(), r, token,
                           load_element(expected, 0), found);
    }
  }
  return {};
}

}  // namespace stbllm::test
