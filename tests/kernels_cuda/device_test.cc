// The cuda backend on a real device. Skipped, with the reason, where there is none.

#include <gtest/gtest.h>

#ifdef STBLLM_HAS_CUDA

#include "device_checks.h"

namespace stbllm {
namespace {

class CudaDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string fault = cuda_fault(); !fault.empty()) GTEST_SKIP() << fault;
  }
};

TEST_F(CudaDevice, FragmentLayoutsAreThoseOfTheModel) { EXPECT_EQ(test::probe_device(), ""); }

TEST_F(CudaDevice, ResultsAreEqualToTheLastBit) {
  for (const test::DeviceCase& c : test::device_cases()) ASSERT_EQ(test::compare_on_device(c), "");
}

/// Where a device could run it, a fault would put every model on the CPU without a word.
TEST(CudaFault, IsEmptyExactlyWhereTheDeviceIsGoodEnough) {
  int count = 0, major = 0, pools = 0;
  const bool present = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  if (present) {
    ASSERT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
    ASSERT_EQ(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, 0), cudaSuccess);
  }
  const std::string fault = cuda_fault();
  EXPECT_EQ(fault.empty(), major >= 8 && pools != 0) << fault;
  EXPECT_EQ(fault.find("no CUDA device") != std::string::npos, !present) << fault;
}

}  // namespace
}  // namespace stbllm

#endif
