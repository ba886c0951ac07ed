// What a machine with a GPU is asked by scripts/gpu_check.sh, without torch and without a test framework:
//
//   stbllm-cuda-check probe             do mma and mma.sp lay out their fragments as fragments.h says
//   stbllm-cuda-check compare [few]     the cuda backend against StructuredBinaryMatrix::at()
//   stbllm-cuda-check bench FILE.json   the cuda backend against cublasGemmEx in fp16; a table on stdout
//
// Times are medians of five runs of at least 10 ms between two events. Up to 16 tokens the calls of a run are
// one CUDA graph and walk over enough copies of the weights that none is still in the L2 cache, for both
// sides.

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string_view>
#include <vector>

#include "kernels_cuda/device_checks.h"

namespace stbllm {
namespace {

using test::check_cuda;

void check_cublas(cublasStatus_t status) {
  if (status != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error(fmt::format("cublas: {}", cublasGetStatusString(status)));
}

class Device {
 public:
  explicit Device(size_t bytes) { check_cuda(cudaMalloc(&data_, bytes)); }
  ~Device() { cudaFree(data_); }
  Device(Device&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

int run_probe() {
  const std::string fault = test::probe_device();
  if (fault.empty()) {
    std::puts("probe: all fragment layouts are as expected");
    return 0;
  }
  std::printf("probe: %s\n", fault.c_str());
  return 1;
}

int run_compare(bool few) {
  const std::vector<test::DeviceCase> cases = few ? test::few_device_cases() : test::device_cases();
  int failures = 0;
  for (const test::DeviceCase& c : cases)
    if (const std::string fault = test::compare_on_device(c); !fault.empty()) {
      std::printf("compare: %s\n", fault.c_str());
      ++failures;
    }
  std::printf("compare: %zu of %zu cases are equal to the last bit\n", cases.size() - failures, cases.size());
  return failures > 0 ? 1 : 0;
}

struct Shape {
  const char* model;
  int rows, cols;
};
constexpr Shape kShapes[] = {
    {"LLaMA-2-7B", 4096, 4096},  {"LLaMA-2-7B", 11008, 4096},  {"LLaMA-2-7B", 4096, 11008},
    {"LLaMA-2-13B", 5120, 5120}, {"LLaMA-2-13B", 13824, 5120}, {"LLaMA-2-13B", 5120, 13824},
    {"LLaMA-2-70B", 8192, 8192}, {"LLaMA-2-70B", 28672, 8192}, {"LLaMA-2-70B", 8192, 28672},
    {"LLaMA-3-8B", 1024, 4096},  {"LLaMA-3-8B", 14336, 4096},  {"LLaMA-3-8B", 4096, 14336},
};
constexpr int kTokens[] = {1, 4, 16, 64, 128, 512, 2048, 8192};
constexpr int kMostTokens = 8192;
struct Form {
  NmPattern nm;
  int levels;

  std::string str() const { return nm.str() + (levels > 1 ? fmt::format("x{}", levels) : ""); }
};
constexpr Form kForms[] = {{{2, 4}, 1}, {{2, 4}, 3}, {{4, 8}, 1}};

/// A matrix whose rows repeat every 64: speed does not depend on the bits, and drawing all of them takes
/// long.
StructuredBinaryMatrix repeated_matrix(const Shape& shape, const Form& form) {
  Layout layout;
  layout.rows = 64;
  layout.cols = shape.cols;
  layout.nm = form.nm;
  layout.levels = form.levels;
  const test::OwnedPlanes some = test::random_planes(layout, 1);
  layout.rows = shape.rows;
  test::OwnedPlanes all;
  for (int plane = 0; plane < kPlaneCount; ++plane) {
    all.bytes[plane].resize(static_cast<size_t>(plane_bytes(layout, static_cast<Plane>(plane))));
    for (size_t i = 0; i < all.bytes[plane].size(); i += some.bytes[plane].size())
      std::memcpy(all.bytes[plane].data() + i, some.bytes[plane].data(),
                  std::min(some.bytes[plane].size(), all.bytes[plane].size() - i));
  }
  return all.matrix(layout);
}

class Timer {
 public:
  Timer() {
    check_cuda(cudaStreamCreate(&stream_));
    check_cuda(cudaEventCreate(&begin_));
    check_cuda(cudaEventCreate(&end_));
  }
  cudaStream_t stream() const { return stream_; }

  /// Microseconds per call of call(i), i = 0, 1, 2, ...; the median of five runs.
  double measure(bool as_graph, int calls, const std::function<void(int)>& call) {
    const auto all = [&] {
      for (int i = 0; i < calls; ++i) call(i);
    };
    all();  // whatever is set up on first use
    check_cuda(cudaStreamSynchronize(stream_));
    cudaGraphExec_t graph = nullptr;
    if (as_graph) {
      cudaGraph_t recorded;
      check_cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
      all();
      check_cuda(cudaStreamEndCapture(stream_, &recorded));
      check_cuda(cudaGraphInstantiate(&graph, recorded, 0));
      check_cuda(cudaGraphDestroy(recorded));
    }
    const auto run = [&](int times) {
      check_cuda(cudaEventRecord(begin_, stream_));
      for (int t = 0; t < times; ++t) {
        if (graph != nullptr)
          check_cuda(cudaGraphLaunch(graph, stream_));
        else
          all();
      }
      check_cuda(cudaEventRecord(end_, stream_));
      check_cuda(cudaEventSynchronize(end_));
      float milliseconds = 0.0f;
      check_cuda(cudaEventElapsedTime(&milliseconds, begin_, end_));
      return milliseconds;
    };
    const int times = std::clamp(static_cast<int>(10.0f / std::max(run(1), 1e-3f)), 1, 1000);
    std::vector<double> microseconds;
    for (int repetition = 0; repetition < 5; ++repetition)
      microseconds.push_back(1e3 * run(times) / (static_cast<double>(times) * calls));
    if (graph != nullptr) check_cuda(cudaGraphExecDestroy(graph));
    std::ranges::sort(microseconds);
    return microseconds[2];
  }

 private:
  cudaStream_t stream_;
  cudaEvent_t begin_, end_;
};

/// Bytes read plus bytes written per second of a large copy inside the device.
double measure_copy(Timer& timer) {
  constexpr size_t kBytes = size_t{1} << 30;
  const Device from(kBytes), to(kBytes);
  const double microseconds = timer.measure(false, 4, [&](int) {
    check_cuda(cudaMemcpyAsync(to.get(), from.get(), kBytes, cudaMemcpyDeviceToDevice, timer.stream()));
  });
  return 2.0 * kBytes / microseconds * 1e6;
}

/// Normal halves: operands that do not change would draw less power than real ones. A megabyte of them, again
/// and again.
void fill_random(void* data, size_t bytes) {
  static const std::vector<uint16_t> some = [] {
    std::vector<uint16_t> halves(size_t{1} << 19);
    std::mt19937 rng(5);
    std::normal_distribution<float> normal;
    for (uint16_t& half : halves) half = float_to_half(normal(rng));
    return halves;
  }();
  for (size_t done = 0; done < bytes; done += 2 * some.size())
    check_cuda(cudaMemcpy(static_cast<std::byte*>(data) + done, some.data(),
                          std::min(bytes - done, 2 * some.size()), cudaMemcpyHostToDevice));
}

/// cuBLAS on the timer's stream, with a workspace of its own so that calls can be recorded in a graph.
class Cublas {
 public:
  explicit Cublas(cudaStream_t stream) {
    check_cublas(cublasCreate(&handle_));
    check_cublas(cublasSetStream(handle_, stream));
    check_cublas(cublasSetWorkspace(handle_, workspace_.get(), kWorkspaceBytes));
  }
  ~Cublas() { cublasDestroy(handle_); }
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  /// y (tokens, rows) = x (tokens, cols) W^T in fp16 with sums in float32.
  void multiply(const Shape& shape, int tokens, const Device& weights, const Device& x, const Device& y) {
    const float one = 1.0f, zero = 0.0f;
    check_cublas(cublasGemmEx(handle_, CUBLAS_OP_T, CUBLAS_OP_N, shape.rows, tokens, shape.cols, &one,
                              weights.get(), CUDA_R_16F, shape.cols, x.get(), CUDA_R_16F, shape.cols, &zero,
                              y.get(), CUDA_R_16F, shape.rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

 private:
  static constexpr size_t kWorkspaceBytes = size_t{64} << 20;
  Device workspace_{kWorkspaceBytes};
  cublasHandle_t handle_;
};

/// Tokens up to which a call is bound by the weights: those are timed as graphs over enough copies.
bool is_decoding(int tokens) { return tokens <= 16; }
/// Copies of so many bytes that are together at least three times the L2 cache.
int copies_of(int64_t bytes, const cudaDeviceProp& device) {
  return static_cast<int>(std::clamp<int64_t>(3 * int64_t{device.l2CacheSize} / bytes + 1, 1, 256));
}
/// Calls of a run: each copy as often as the others, and at least eight; one where copies do not matter.
int calls_of(size_t copies, int tokens) {
  return is_decoding(tokens) ? static_cast<int>(copies * ((8 + copies - 1) / copies)) : 1;
}

/// Microseconds of the dense product, by index of kTokens.
std::vector<double> measure_cublas(Timer& timer, Cublas& cublas, const cudaDeviceProp& device,
                                   const Shape& shape, const Device& x, const Device& y) {
  const int64_t bytes = 2 * int64_t{shape.rows} * shape.cols;
  std::vector<Device> copies;
  for (int i = 0; i < copies_of(bytes, device); ++i) {
    copies.emplace_back(bytes);
    fill_random(copies.back().get(), bytes);
  }
  std::vector<double> microseconds;
  for (const int tokens : kTokens)
    microseconds.push_back(timer.measure(is_decoding(tokens), calls_of(copies.size(), tokens), [&](int i) {
      cublas.multiply(shape, tokens, copies[i % copies.size()], x, y);
    }));
  return microseconds;
}

struct Packed {
  int64_t bytes;                     ///< of a prepared matrix
  std::vector<double> microseconds;  ///< by index of kTokens
};

Packed measure_packed(Timer& timer, const cudaDeviceProp& device, const Shape& shape, const Form& form,
                      const Device& x, const Device& y) {
  const Backend& backend = cuda_backend();
  const StructuredBinaryMatrix matrix = repeated_matrix(shape, form);
  std::vector<std::unique_ptr<PreparedMatrix>> copies;
  copies.push_back(backend.prepare(matrix));
  Packed packed = {.bytes = copies[0]->bytes(), .microseconds = {}};
  while (std::ssize(copies) < copies_of(packed.bytes, device)) copies.push_back(backend.prepare(matrix));
  for (const int tokens : kTokens) {
    const ActivationView input{x.get(), ElementType::kFloat16, tokens, shape.cols};
    const ActivationView output{y.get(), ElementType::kFloat16, tokens, shape.rows};
    packed.microseconds.push_back(timer.measure(
        is_decoding(tokens), calls_of(copies.size(), tokens),
        [&](int i) { backend.matmul(*copies[i % copies.size()], input, output, timer.stream()); }));
  }
  return packed;
}

void print_row(const Shape& shape, const Form& form, int tokens, int64_t bytes, double us, double cublas_us,
               double copy_bytes_per_second) {
  const double weights = static_cast<double>(shape.rows) * shape.cols, flops = 2.0 * weights * tokens;
  const double bytes_per_second = static_cast<double>(bytes) / us * 1e6;
  std::printf("%-12s %6d %6d %6d  %-6s %6.3f %10.2f %8.0f %7.1f %9.1f %11.2f %10.1f %8.2f\n", shape.model,
              shape.rows, shape.cols, tokens, form.str().c_str(), 8.0 * static_cast<double>(bytes) / weights,
              us, bytes_per_second * 1e-9, 100 * bytes_per_second / copy_bytes_per_second, flops / us * 1e-6,
              cublas_us, flops / cublas_us * 1e-6, cublas_us / us);
  std::fflush(stdout);
}

int run_bench(const char* path) {
  if (const std::string fault = cuda_fault(); !fault.empty()) throw std::runtime_error(fault);
  cudaDeviceProp device;
  check_cuda(cudaGetDeviceProperties(&device, 0));
  std::ofstream json(path);
  if (!json) throw std::runtime_error(fmt::format("cannot write {}", path));

  Timer timer;
  Cublas cublas(timer.stream());
  const double copy = measure_copy(timer);
  std::printf("%s, compute capability %d.%d, %d SMs, copy %.0f GB/s\n\n", device.name, device.major,
              device.minor, device.multiProcessorCount, copy * 1e-9);
  std::printf("%-12s %6s %6s %6s  %-6s %6s %10s %8s %7s %9s %11s %10s %8s\n", "model", "rows", "cols",
              "tokens", "layout", "bits", "us", "GB/s", "% copy", "TFLOP/s", "cublas us", "TFLOP/s",
              "speed-up");
  json << fmt::format("{{\"device\": \"{}\", \"copy_bytes_per_second\": {}, \"results\": [", device.name,
                      copy);
  const char* separator = "";
  for (const Shape& shape : kShapes) {
    const Device x(size_t{2} * kMostTokens * shape.cols), y(size_t{2} * kMostTokens * shape.rows);
    fill_random(x.get(), size_t{2} * kMostTokens * shape.cols);
    const std::vector<double> dense_us = measure_cublas(timer, cublas, device, shape, x, y);
    for (const Form& form : kForms) {
      const Packed packed = measure_packed(timer, device, shape, form, x, y);
      for (size_t t = 0; t < std::size(kTokens); ++t) {
        print_row(shape, form, kTokens[t], packed.bytes, packed.microseconds[t], dense_us[t], copy);
        json << fmt::format(
            "{}\n{{\"model\": \"{}\", \"rows\": {}, \"cols\": {}, \"tokens\": {}, \"layout\": \"{}\", "
            "\"bytes\": "
            "{}, \"microseconds\": {:.3f}, \"cublas_microseconds\": {:.3f}}}",
            separator, shape.model, shape.rows, shape.cols, kTokens[t], form.str(), packed.bytes,
            packed.microseconds[t], dense_us[t]);
        separator = ",";
      }
    }
    json.flush();
  }
  json << "\n]}\n";
  json.close();
  if (!json) throw std::runtime_error(fmt::format("cannot write {}", path));
  return 0;
}

int run(int argc, char** argv) {
  const std::string_view command = argc > 1 ? argv[1] : "";
  if (command == "probe") return run_probe();
  if (command == "compare") return run_compare(argc > 2 && std::string_view(argv[2]) == "few");
  if (command == "bench" && argc == 3) return run_bench(argv[2]);
  std::fputs("usage: stbllm-cuda-check probe | compare [few] | bench FILE.json\n", stderr);
  return 2;
}

}  // namespace
}  // namespace stbllm

int main(int argc, char** argv) {
  try {
    return stbllm::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "stbllm-cuda-check: %s\n", error.what());
    return 1;
  }
}
