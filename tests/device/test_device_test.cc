// The device of the tests itself: nobody touches its memory from outside, its operations give what the CPU's
// give, and it refuses what CUDA refuses.

#include "support/test_device.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace stbllm {
namespace {

using test::test_device;
using test::Transfers;
using test::transfers;

at::Tensor on_device(const at::Tensor& tensor) { return tensor.to(test_device()); }

void expect_refused(const std::function<void()>& operation) {
  try {
    operation();
    ADD_FAILURE() << "tensors of two devices were taken";
  } catch (const c10::Error& error) {
    EXPECT_THAT(error.what_without_backtrace(), testing::HasSubstr("same device"));
  }
}

TEST(TestDeviceDeathTest, HostAccessEndsTheProgram) {
  const at::Tensor x = at::arange(8, at::kFloat).to(test_device());
  EXPECT_DEATH({ [[maybe_unused]] const volatile float value = x.data_ptr<float>()[3]; }, "");
  EXPECT_DEATH({ x.data_ptr<float>()[3] = 1; }, "");
  EXPECT_DEATH({ at::from_blob(x.data_ptr(), {8}, at::kFloat).sum(); }, "");
  // Neither an operation that is over nor a view opens the pages.
  const at::Tensor part = x.add_(1).slice(0, 2, 5);
  EXPECT_DEATH({ [[maybe_unused]] const volatile float value = part.data_ptr<float>()[0]; }, "");
  const test::DeviceAccess access(part);
  EXPECT_EQ(part.data_ptr<float>()[0], 3);
}

TEST(TestDevice, RefusesTensorsOfTwoDevices) {
  const at::Tensor host = at::ones({3, 3}), device = on_device(host), index = at::zeros({2}, at::kLong);
  expect_refused([&] { device + host; });
  expect_refused([&] { host + device; });
  expect_refused([&] { at::mm(device, host); });
  expect_refused([&] { at::cat({host, device}); });
  expect_refused([&] { host.clone().add_(device); });
  expect_refused([&] { device.index_select(0, index); });
  expect_refused([&] { device.gather(0, index.view({1, 2})); });
  expect_refused([&] { at::zeros({}).add_(on_device(at::ones({}))); });
  // What CUDA takes from the host: scalars and the indices of index().
  EXPECT_TRUE((device * at::full({}, 2.0)).cpu().equal(2 * host));
  EXPECT_TRUE(device.index({index}).cpu().equal(host.index({index})));
}

TEST(TestDevice, ComputesWhatTheCpuComputes) {
  at::manual_seed(3);
  const at::Tensor a = at::randn({6, 8}), b = at::randn({8, 5}), x = on_device(a), y = on_device(b);
  EXPECT_EQ(x.device(), test_device());
  EXPECT_TRUE(at::mm(x, y).cpu().equal(at::mm(a, b)));
  EXPECT_TRUE(at::linear(x, y.t(), on_device(b[0])).cpu().equal(at::linear(a, b.t(), b[0])));
  EXPECT_TRUE(at::where(x > 0, x, 0).sum(1).cpu().equal(at::where(a > 0, a, 0).sum(1)));
  EXPECT_TRUE(std::get<1>(x.topk(3, 1)).cpu().equal(std::get<1>(a.topk(3, 1))));
  EXPECT_TRUE(at::cat(x.split(3, 1), 1).cpu().equal(a));
  EXPECT_TRUE(at::log_softmax(x.to(at::kBFloat16), -1).cpu().equal(at::log_softmax(a.to(at::kBFloat16), -1)));
  EXPECT_TRUE(at::arange(7, at::TensorOptions().device(test_device())).cpu().equal(at::arange(7)));
  EXPECT_EQ(x.max().item<float>(), a.max().item<float>());
  at::Tensor out = at::empty({0}, x.options());
  at::mm_out(out, x, y);
  EXPECT_TRUE(out.cpu().equal(at::mm(a, b)));
}

TEST(TestDevice, ViewsShareMemory) {
  const at::Tensor a = at::arange(24, at::kFloat).view({4, 6}).clone(), x = on_device(a);
  for (const at::Tensor& t : {a, x}) {
    t.t().narrow(0, 1, 2).mul_(10);
    t.view({2, 12})[1].slice(0, 0, 12, 3).fill_(-1);
    t.diagonal().copy_(at::zeros({4}));
    t.unsqueeze(0).transpose(1, 2)[0][5].zero_();
    t.narrow(0, 2, 2).addmm_(t.narrow(0, 0, 2).narrow(1, 0, 2), t.narrow(0, 0, 2), 1, -1);
  }
  EXPECT_TRUE(x.cpu().equal(a));
}

TEST(TestDevice, GradientsAreThoseOfTheCpu) {
  at::manual_seed(5);
  const at::Tensor weight = at::randn({5, 8}), input = at::randn({2, 3, 8}), norm = at::rand({8});
  std::vector<at::Tensor> gradients;
  for (const at::Device device : {at::Device(at::kCPU), test_device()}) {
    const at::AutoGradMode with_grad(true);
    const at::Tensor w = weight.to(device, at::kFloat, false, true).set_requires_grad(true),
                     n = norm.to(device, at::kFloat, false, true).set_requires_grad(true),
                     x = input.to(device);
    const at::Tensor y = at::linear(x * at::rsqrt(x.square().mean(-1, true) + 1e-5) * n, w);
    at::log_softmax(y, -1).select(-1, 2).mean().backward();
    EXPECT_EQ(w.grad().device(), device);
    gradients.push_back(w.grad().cpu());
    gradients.push_back(n.grad().cpu());
  }
  EXPECT_TRUE(gradients[0].equal(gradients[2]));
  EXPECT_TRUE(gradients[1].equal(gradients[3]));
}

TEST(TestDevice, CountsWhatCrosses) {
  const at::Tensor host = at::ones({4});
  const auto expect = [](const std::function<void()>& work, const Transfers& expected) {
    const Transfers before = transfers();
    work();
    const Transfers seen = transfers() - before;
    EXPECT_EQ(seen.to_device, expected.to_device);
    EXPECT_EQ(seen.to_host, expected.to_host);
    EXPECT_EQ(seen.waits, expected.waits);
  };
  at::Tensor x;
  expect([&] { x = on_device(host); }, {.to_device = 1});
  expect([&] { x = (x.to(at::kBFloat16) + 1).to(at::kFloat).clone().contiguous(); }, {});
  expect([&] { x.sum(); }, {});
  expect([&] { x.sum().item<float>(); }, {.waits = 1});
  expect([&] { x.cpu(); }, {.to_host = 1, .waits = 1});
  expect([&] { x.slice(0, 1, 3).copy_(host.slice(0, 0, 2)); }, {.to_device = 1});
  expect([&] { x.equal(x); }, {.waits = 1});
  expect([&] { x.nonzero(); }, {.waits = 1});
}

}  // namespace
}  // namespace stbllm
