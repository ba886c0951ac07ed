// The cuda backend: device memory, argument checks and the choice between GEMV and GEMM.

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "launch.h"
#include "plan.h"
#include "stbllm/backend/activations.h"
#include "stbllm/backend/builtin.h"

namespace stbllm {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(fmt::format("cuda: {}: {}", what, cudaGetErrorString(error)));
}

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(int64_t bytes) {
    if (bytes > 0) check(cudaMalloc(&data_, static_cast<size_t>(bytes)), "allocating device memory");
  }
  /// A copy of host bytes.
  explicit DeviceMemory(std::span<const std::byte> bytes) : DeviceMemory(std::ssize(bytes)) {
    if (!bytes.empty())
      check(cudaMemcpy(data_, bytes.data(), bytes.size(), cudaMemcpyHostToDevice), "copying to the device");
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

// Scratch of one matmul, allocated and freed in the order of its stream, so that concurrent streams need no
// lock and none waits for the device.
class StreamMemory {
 public:
  StreamMemory(int64_t bytes, cudaStream_t stream) : stream_(stream) {
    check(cudaMallocAsync(&data_, static_cast<size_t>(bytes), stream), "allocating scratch memory");
  }
  ~StreamMemory() { cudaFreeAsync(data_, stream_); }
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

class CudaMatrix : public PreparedMatrix {
 public:
  explicit CudaMatrix(const StructuredBinaryMatrix& matrix) : CudaMatrix(matrix, cuda::plan_matrix(matrix)) {}
  int64_t bytes() const override { return bytes_; }
  const cuda::WeightView& view() const { return view_; }

 private:
  CudaMatrix(const StructuredBinaryMatrix& matrix, const cuda::Plan& plan)
      : view_(plan.weights),
        bytes_(plan.bytes()),
        records_(4 * plan.record_words()),
        extra_values_(4 * plan.extra_words()),
        extra_columns_(std::as_bytes(std::span(plan.extra_columns))),
        taken_(std::as_bytes(std::span(plan.taken))) {
    view_.records = records_.as<uint32_t>();
    view_.extra_values = extra_values_.as<uint32_t>();
    view_.extra_columns = extra_columns_.as<int32_t>();
    view_.taken = taken_.as<uint8_t>();

    const auto upload = [&](Plane plane) { return DeviceMemory(matrix.plane(plane)); };
    const DeviceMemory codes = upload(Plane::kCodes), scales = upload(Plane::kScales),
                       scale_codes = upload(Plane::kScaleCodes), row_scales = upload(Plane::kRowScales),
                       levels = upload(Plane::kLevels), salient_columns = upload(Plane::kSalientColumns),
                       salient_signs = upload(Plane::kSalientSigns), outliers = upload(Plane::kOutlierValues);
    cuda::PlaneView planes = plan.planes;
    planes.codes = codes.as<uint8_t>();
    planes.scales = scales.as<uint16_t>();
    planes.scale_codes = scale_codes.as<uint8_t>();
    planes.row_scales = row_scales.as<uint16_t>();
    planes.level_values = levels.as<uint16_t>();
    planes.salient_columns = salient_columns.as<int32_t>();
    planes.salient_signs = salient_signs.as<uint8_t>();
    planes.outlier_values = outliers.as<uint16_t>();
    check(cuda::launch_repack(planes, view_, records_.as<uint32_t>(), extra_values_.as<uint32_t>(), nullptr),
          "repacking a matrix");
    check(cudaStreamSynchronize(nullptr), "repacking a matrix");
  }

  cuda::WeightView view_;
  int64_t bytes_;
  DeviceMemory records_, extra_values_, extra_columns_, taken_;
};

class CudaBackend : public Backend {
 public:
  std::string_view name() const override { return "cuda"; }
  std::string_view device() const override { return "cuda"; }

  std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const override {
    return std::make_unique<CudaMatrix>(matrix);
  }

  void matmul(const PreparedMatrix& prepared, const ActivationView& x, const ActivationView& y,
              void* stream_handle) const override {
    const cuda::WeightView& weights = dynamic_cast<const CudaMatrix&>(prepared).view();
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    check_activations(weights.rows, weights.cols, x, y);
    STBLLM_CHECK(reinterpret_cast<uintptr_t>(y.data) % 4 == 0, "result at {}", y.data);
    const cuda::InputView input = cuda::view_input(weights, x.data, x.type, x.tokens);
    const cuda::OutputView output{y.data, y.type, input.tokens};
    const auto gemv = [&](const uint16_t* staged, const float* token_scales) {
      check(cuda::launch_gemv(weights, input, staged, token_scales, output, stream),
            "launching the gemv kernel");
    };
    if (x.tokens == 1) return gemv(nullptr, nullptr);
    const int64_t staged_bytes = x.tokens * cuda::staged_width(weights) * 2;  // a multiple of 128
    const StreamMemory scratch(staged_bytes + x.tokens * 4, stream);
    auto* staged = reinterpret_cast<uint16_t*>(scratch.data());
    auto* token_scales = reinterpret_cast<float*>(scratch.data() + staged_bytes);
    check(cuda::launch_stage(weights, input, staged, token_scales, stream), "launching the staging kernel");
    if (x.tokens <= cuda::kMaxGemvTokens) return gemv(staged, token_scales);
    check(cuda::launch_gemm(weights, staged, token_scales, output, stream), "launching the gemm kernel");
  }
};

std::string find_cuda_fault() {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess)
    return fmt::format("no CUDA device: {}", cudaGetErrorString(error));
  if (count == 0) return "no CUDA device";
  int device = 0, major = 0, minor = 0, pools = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
        "asking for the compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
        "asking for the compute capability");
  check(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device), "asking for memory pools");
  if (major < 8)
    return fmt::format("the CUDA device has compute capability {}.{}; 8.0 or newer is needed", major, minor);
  if (pools == 0) return "the CUDA device does not support memory pools";
  // Freed scratch stays with the pool instead of going back to the driver at every synchronisation.
  cudaMemPool_t pool;
  uint64_t keep_all = UINT64_MAX;
  check(cudaDeviceGetDefaultMemPool(&pool, device), "asking for the memory pool");
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_all),
        "setting up the memory pool");
  return {};
}

}  // namespace

const Backend& cuda_backend() {
  static const CudaBackend backend;
  return backend;
}

std::string cuda_fault() {
  static const std::string fault = []() -> std::string {
    try {
      return find_cuda_fault();
    } catch (const std::exception& error) {
      return error.what();
    }
  }();
  return fault;
}

}  // namespace stbllm
