#pragma once
// Scopes in which the program believes that the processor is another, so that every machine tests both sides
// of the choices that depend on it.

#include <gtest/gtest.h>

#include <optional>
#include <string>

#include "stbllm/base/cpu.h"

namespace stbllm::test {

/// The dtype in which calibration and training multiply on the CPU: bfloat16 where the processor has fast
/// instructions for it, else float32. Other processors are slow at bfloat16, but round in the same way.
enum class Products { kFloat32, kBFloat16 };

inline std::string name_of(Products products) {
  return products == Products::kFloat32 ? "float32" : "bfloat16";
}

/// Sets one of the answers of stbllm/base/cpu.h for a scope.
class Assume {
 public:
  Assume(std::optional<bool>& answer, bool value) : answer_(answer), before_(answer) { answer_ = value; }
  explicit Assume(Products products) : Assume(assumed_fast_bfloat16, products == Products::kBFloat16) {}
  ~Assume() { answer_ = before_; }
  Assume(const Assume&) = delete;
  Assume& operator=(const Assume&) = delete;

 private:
  std::optional<bool>& answer_;
  std::optional<bool> before_;
};

/// Runs each test of a suite with products in float32 and in bfloat16:
///   class Training : public test::InBothProducts {};
///   TEST_P(Training, LowersTheLoss) { .. }
///   STBLLM_INSTANTIATE_PRODUCTS(Training);
class InBothProducts : public testing::TestWithParam<Products> {
 private:
  const Assume products_{GetParam()};
};

#define STBLLM_INSTANTIATE_PRODUCTS(suite)                                                       \
  INSTANTIATE_TEST_SUITE_P(Products, suite,                                                      \
                           testing::Values(test::Products::kFloat32, test::Products::kBFloat16), \
                           [](const auto& info) { return test::name_of(info.param); })

}  // namespace stbllm::test
