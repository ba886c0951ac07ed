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
struct Code {
  NmPattern nm;
  int levels;
};
constexpr Code kCodes[] = {{{2, 4}, 1}, {{2, 4}, 3}, {{4, 8}, 1}};

/// A matrix whose rows repeat every 64: speed does not depend on the bits, and drawing all of them takes
/// long.
StructuredBinaryMatrix repeated_matrix(const Shape& shape, const Code& code) {
  Layout layout;
  layout.rows = 64;
  layout.cols = shape.cols;
  layout.nm = code.nm;
  layout.levels = code.levels;
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

  /// Microseconds per call of call(i), i = 0, 1, 2, ...
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

int run_bench(const char* path) {
  if (const std::string fault = cuda_fault(); !fault.empty()) throw std::runtime_error(fault);
  cudaDeviceProp device;
  check_cuda(cudaGetDeviceProperties(&device, 0));
  std::ofstream json(path);
  if (!json) throw std::runtime_error(fmt::format("cannot write {}", path));

  Timer timer;
  cublasHandle_t cublas;
  const Device workspace(size_t{64} << 20);
  check_cublas(cublasCreate(&cublas));
  check_cublas(cublasSetStream(cublas, timer.stream()));
  check_cublas(
      cublasSetWorkspace(cublas, workspace.get(), size_t{64} << 20));  // so that calls can be recorded

  const double copy = measure_copy(timer);
  std::printf("%s, compute capability %d.%d, %d SMs, copy %.0f GB/s\n\n", device.name, device.major,
              device.minor, device.multiProcessorCount, copy * 1e-9);
  std::printf("%-12s %6s %6s %6s  %-6s %6s %10s %8s %7s %9s %11s %10s %8s\n", "model", "rows", "cols",
              "tokens", "code", "bits", "us", "GB/s", "% copy", "TFLOP/s", "cublas us", "TFLOP/s",
              "speed-up");
  json << fmt::format("{{\"device\": \"{}\", \"copy_bytes_per_second\": {}, \"results\": [", device.name,
                      copy);

  const Backend& backend = cuda_backend();
  const auto copies_of = [&](int64_t bytes) {  // together at least three times the L2 cache
    return static_cast<int>(std::clamp<int64_t>(3 * int64_t{device.l2CacheSize} / bytes + 1, 1, 256));
  };
  const auto calls_of = [](size_t copies) {  // each copy as often as the others, and at least eight calls
    return static_cast<int>(copies * ((8 + copies - 1) / copies));
  };
  bool first = true;
  for (const Shape& shape : kShapes) {
    const int64_t weights = int64_t{shape.rows} * shape.cols, most_tokens = kTokens[std::size(kTokens) - 1];
    const Device x(2 * most_tokens * shape.cols), y(2 * most_tokens * shape.rows);
    fill_random(x.get(), 2 * most_tokens * shape.cols);
    std::vector<double> dense_us;
    {
      std::vector<Device> dense;
      for (int i = 0; i < copies_of(2 * weights); ++i) {
        dense.emplace_back(2 * weights);
        fill_random(dense.back().get(), 2 * weights);
      }
      for (const int tokens : kTokens) {
        const float one = 1.0f, zero = 0.0f;
        const auto call = [&](int i) {
          check_cublas(cublasGemmEx(cublas, CUBLAS_OP_T, CUBLAS_OP_N, shape.rows, tokens, shape.cols, &one,
                                    dense[i % dense.size()].get(), CUDA_R_16F, shape.cols, x.get(),
                                    CUDA_R_16F, shape.cols, &zero, y.get(), CUDA_R_16F, shape.rows,
                                    CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
        };
        const bool decode = tokens <= 16;
        dense_us.push_back(timer.measure(decode, decode ? calls_of(dense.size()) : 1, call));
      }
    }
    for (const Code& code : kCodes) {
      const StructuredBinaryMatrix matrix = repeated_matrix(shape, code);
      std::vector<std::unique_ptr<PreparedMatrix>> packed;
      packed.push_back(backend.prepare(matrix));
      const int64_t bytes = packed[0]->bytes();
      while (std::ssize(packed) < copies_of(bytes)) packed.push_back(backend.prepare(matrix));
      for (size_t t = 0; t < std::size(kTokens); ++t) {
        const int tokens = kTokens[t];
        const ActivationView input{x.get(), ElementType::kFloat16, tokens, shape.cols};
        const ActivationView output{y.get(), ElementType::kFloat16, tokens, shape.rows};
        const bool decode = tokens <= 16;
        const double us = timer.measure(decode, decode ? calls_of(packed.size()) : 1, [&](int i) {
          backend.matmul(*packed[i % packed.size()], input, output, timer.stream());
        });
        const double gbs = bytes / us * 1e-3, flops = 2.0 * weights * tokens;
        const std::string name = code.nm.str() + (code.levels > 1 ? fmt::format("x{}", code.levels) : "");
        std::printf("%-12s %6d %6d %6d  %-6s %6.3f %10.2f %8.0f %7.1f %9.1f %11.2f %10.1f %8.2f\n",
                    shape.model, shape.rows, shape.cols, tokens, name.c_str(), 8.0 * bytes / weights, us, gbs,
                    gbs * 1e11 / copy, flops / us * 1e-6, dense_us[t], flops / dense_us[t] * 1e-6,
                    dense_us[t] / us);
        std::fflush(stdout);
        json << fmt::format(
            "{}\n{{\"model\": \"{}\", \"rows\": {}, \"cols\": {}, \"tokens\": {}, \"code\": \"{}\", "
            "\"bytes\": {}, "
            "\"microseconds\": {:.3f}, \"cublas_microseconds\": {:.3f}}}",
            first ? "" : ",", shape.model, shape.rows, shape.cols, tokens, name, bytes, us, dense_us[t]);
        first = false;
      }
    }
    json.flush();
  }
  json << "\n]}\n";
  json.close();
  if (!json) throw std::runtime_error(fmt::format("cannot write {}", path));
  check_cublas(cublasDestroy(cublas));
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
