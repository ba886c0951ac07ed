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

TEST(CudaFault, IsASentenceOrEmpty) {
  const std::string fault = cuda_fault();
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    EXPECT_NE(fault.find("no CUDA device"), std::string::npos) << fault;
  }
}

}  // namespace
}  // namespace stbllm

#endif
