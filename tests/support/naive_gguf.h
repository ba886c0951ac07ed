#pragma once
// A reader of GGUF files, written from ggml's description of the container and of its blocks and as plainly
// as possible: keys as JSON, tensors as floats. Nothing here may include stbllm/export.

#include <cstdint>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "stbllm/base/bits.h"

namespace stbllm::test {

struct GgufTensor {
  uint32_t type = 0;
  std::vector<int64_t> shape;  ///< outermost dimension first
  std::vector<float> values;
};

class NaiveGguf {
 public:
  explicit NaiveGguf(std::string bytes) : bytes_(std::move(bytes)) {
    if (bytes_.substr(0, 4) != "GGUF") throw std::runtime_error("no GGUF file");
    at_ = 4;
    if (take<uint32_t>() != 3) throw std::runtime_error("another version");
    const auto tensors = take<uint64_t>(), keys = take<uint64_t>();
    for (uint64_t i = 0; i < keys; ++i) {
      const std::string name = text();
      this->keys[name] = value(take<uint32_t>());
    }
    std::map<std::string, uint64_t> offsets;
    for (uint64_t i = 0; i < tensors; ++i) {
      const std::string name = text();
      GgufTensor& tensor = this->tensors[name];
      const auto dimensions = take<uint32_t>();
      for (uint32_t d = 0; d < dimensions; ++d)
        tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(take<uint64_t>()));
      tensor.type = take<uint32_t>();
      offsets[name] = take<uint64_t>();
    }
    const size_t data = (at_ + 31) / 32 * 32;
    for (auto& [name, tensor] : this->tensors) {
      if (offsets[name] % 32 != 0) throw std::runtime_error(name + " is not aligned");
      at_ = data + offsets[name];
      size_t count = 1;
      for (const int64_t size : tensor.shape) count *= static_cast<size_t>(size);
      while (tensor.values.size() < count) block(tensor);
    }
  }

  std::map<std::string, nlohmann::json> keys;
  std::map<std::string, GgufTensor> tensors;

 private:
  template <typename T>
  T take() {
    T value;
    if (at_ + sizeof value > bytes_.size()) throw std::runtime_error("the file ends early");
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  std::string text() {
    const auto length = take<uint64_t>();
    at_ += length;
    return bytes_.substr(at_ - length, length);
  }
  nlohmann::json value(uint32_t type) {
    switch (type) {
      case 4:
        return take<uint32_t>();
      case 5:
        return take<int32_t>();
      case 6:
        return take<float>();
      case 7:
        return take<uint8_t>() != 0;
      case 8:
        return text();
      case 9: {
        const auto of = take<uint32_t>();
        nlohmann::json values = nlohmann::json::array();
        for (auto left = take<uint64_t>(); left > 0; --left) values.push_back(value(of));
        return values;
      }
    }
    throw std::runtime_error("a value of type " + std::to_string(type));
  }

  /// Reads one block.
  void block(GgufTensor& tensor) {
    std::vector<float>& out = tensor.values;
    const auto bytes = [&](int count) {
      std::vector<uint8_t> taken;
      for (int i = 0; i < count; ++i) taken.push_back(take<uint8_t>());
      return taken;
    };
    const auto half = [&] { return half_to_float(take<uint16_t>()); };
    const auto scaled = [&](const std::vector<int>& q, float d) {
      for (const int x : q) out.push_back(d * static_cast<float>(x));
    };
    std::vector<int> q;
    switch (tensor.type) {
      case 0:  // F32
        out.push_back(take<float>());
        return;
      case 1:  // F16
        out.push_back(half());
        return;
      case 30:  // BF16
        out.push_back(bfloat16_to_float(take<uint16_t>()));
        return;
      case 2: {  // Q4_0
        const float d = half();
        const auto b = bytes(16);
        for (const int shift : {0, 4})
          for (const uint8_t byte : b) q.push_back((byte >> shift & 15) - 8);
        scaled(q, d);
        return;
      }
      case 8: {  // Q8_0
        const float d = half();
        for (int i = 0; i < 32; ++i) q.push_back(take<int8_t>());
        scaled(q, d);
        return;
      }
      case 34: {  // TQ1_0: five digits of base 3 in a byte as a fraction of 256, taken from the top
        const auto b = bytes(52);
        const auto digit = [&](uint8_t byte, int n) {
          int fraction = byte;
          for (; n > 0; --n) fraction = fraction * 3 % 256;
          return fraction * 3 / 256 - 1;
        };
        for (const auto& [first, count, digits] : {std::array{0, 32, 5}, {32, 16, 5}, {48, 4, 4}})
          for (int n = 0; n < digits; ++n)
            for (int i = first; i < first + count; ++i) q.push_back(digit(b[i], n));
        scaled(q, half());
        return;
      }
      case 35: {  // TQ2_0
        const auto b = bytes(64);
        for (const int first : {0, 32})
          for (const int shift : {0, 2, 4, 6})
            for (int i = first; i < first + 32; ++i) q.push_back((b[i] >> shift & 3) - 1);
        scaled(q, half());
        return;
      }
    }
    throw std::runtime_error("a tensor of type " + std::to_string(tensor.type));
  }

  std::string bytes_;
  size_t at_ = 0;
};

}  // namespace stbllm::test
