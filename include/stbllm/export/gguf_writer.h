#pragma once
// The GGUF container (version 3) of ggml and llama.cpp: typed keys, then tensors in blocks of quantized
// values. There is no libtorch here.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace stbllm {

/// The types of tensors that are written, with the numbers that ggml has for them.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,  ///< 32 weights: fp16 d, 4-bit q; d (q - 8)
  kQ8_0 = 8,  ///< 32 weights: fp16 d, 8-bit q; d q
  kBF16 = 30,
  kTQ1_0 = 34,  ///< 256 weights: five of -d, 0, d in a byte, fp16 d
  kTQ2_0 = 35,  ///< 256 weights: four of -d, 0, d in a byte, fp16 d
};
std::string_view gguf_type_name(GgufType type);
/// Weights and bytes of a block.
int64_t gguf_block_weights(GgufType type);
int64_t gguf_block_bytes(GgufType type);

/// Encodes `weights`, whole blocks of a type other than the floats, where each block holds nothing but -d, 0
/// and d for a d that fp16 holds. Returns false where it holds something else; `out` is then undefined.
bool encode_ternary(GgufType type, std::span<const float> weights, std::span<std::byte> out);
/// Encodes integers in whole blocks of kQ4_0 (-8..7) or kQ8_0 with an fp16 scale each.
void encode_integers(GgufType type, std::span<const int8_t> integers, std::span<const uint16_t> scales,
                     std::span<std::byte> out);

class GgufWriter {
 public:
  /// Keys and values, in the order of their arrival.
  void set(std::string_view key, std::string_view value);
  void set(std::string_view key, const char* value) { set(key, std::string_view(value)); }
  void set(std::string_view key, uint32_t value);
  void set(std::string_view key, float value);
  void set(std::string_view key, bool value);
  void set(std::string_view key, const std::vector<std::string>& values);
  void set(std::string_view key, const std::vector<int32_t>& values);
  void set(std::string_view key, const std::vector<float>& values);

  /// Announces a tensor of `shape`, outermost dimension first, whose bytes `fill` writes when their turn
  /// comes.
  using Fill = std::function<void(std::span<std::byte> bytes)>;
  void add(const std::string& name, GgufType type, std::vector<int64_t> shape, Fill fill);

  /// Writes the file, which appears under its name as a whole. Throws Error(kExists) when it is there and not
  /// `force`, Error(kWriteFailed), and what a `fill` throws.
  void write(const std::filesystem::path& path, bool force) const;

 private:
  struct Tensor {
    std::string name;
    GgufType type;
    std::vector<int64_t> shape;
    Fill fill;
    int64_t bytes;
  };

  std::string keys_;
  uint64_t key_count_ = 0;
  std::vector<Tensor> tensors_;
};

}  // namespace stbllm
