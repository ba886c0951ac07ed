#pragma once
// What both kinds of weight files share: a tensor whose elements are mapped bytes.

#include <ATen/ATen.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "stbllm/base/error.h"

namespace stbllm {

/// A tensor whose storage starts at `data` and that keeps `owner` (the mapping) alive. Both formats allow
/// bytes that are not aligned to their elements; those are copied.
inline at::Tensor mapped_tensor(std::shared_ptr<const void> owner, std::span<const std::byte> data,
                                at::IntArrayRef shape, at::IntArrayRef strides, at::ScalarType dtype) {
  void* address =
      const_cast<std::byte*>(data.data());  // from_blob knows no const, but the pages are read-only
  if (reinterpret_cast<uintptr_t>(address) % c10::elementSize(dtype) != 0) {
    auto copy = std::make_shared<std::vector<std::byte>>(data.begin(), data.end());
    address = copy->data();
    owner = std::move(copy);
  }
  return at::from_blob(
      address, shape, strides, [owner](void*) {}, at::TensorOptions(dtype));
}

[[noreturn]] inline void refuse_dtype(const std::filesystem::path& file, const std::string& name,
                                      std::string_view dtype) {
  fail(ErrorCode::kUnsupported, "{}: tensor {} has dtype {}; expected F32, F16 or BF16", file.string(), name,
       dtype);
}

}  // namespace stbllm
