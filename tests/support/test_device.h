#pragma once
// A device of its own for tests, so that code for GPUs runs whole on a machine without one. libtorch knows it
// as "testdevice". Its operations are those of the CPU, but its tensors live in pages that nobody may
// touch while none of its operations runs: a loop over data_ptr() of such a tensor ends the test with
// SIGSEGV. As on CUDA, an operation refuses tensors of several devices (a scalar, 0-dimensional tensor of the
// CPU is allowed, and so are indices from the CPU), and gradients come from a thread of the device.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace stbllm::test {

/// What QuantizeOptions::device calls it.
inline constexpr const char* kTestDevice = "testdevice";
/// The device. A test program that calls this, or anything else of this file, has it.
at::Device test_device();

/// What has crossed between the host and the device.
struct Transfers {
  int64_t to_device = 0;  ///< tensors copied there
  int64_t to_host = 0;    ///< tensors copied back
  /// How often the host waited for the device: for each tensor copied back, for each item(), and for each
  /// operation whose result is a number or whose shape depends on values, such as equal() and nonzero().
  int64_t waits = 0;

  Transfers operator-(const Transfers& earlier) const {
    return {to_device - earlier.to_device, to_host - earlier.to_host, waits - earlier.waits};
  }
};
/// All so far in this process.
Transfers transfers();

/// In its scope the host may touch the memory of a tensor of the test device, or what lies at `data` of one.
/// For what stands in for a kernel of the device.
class DeviceAccess {
 public:
  explicit DeviceAccess(const void* data);
  explicit DeviceAccess(const at::Tensor& tensor);
  ~DeviceAccess();
  DeviceAccess(DeviceAccess&& from) noexcept;
  DeviceAccess(const DeviceAccess&) = delete;
  DeviceAccess& operator=(const DeviceAccess&) = delete;

 private:
  std::uintptr_t pages_ = 0;  // the first address; 0: nothing is held
};

}  // namespace stbllm::test
