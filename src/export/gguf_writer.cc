#include "stbllm/export/gguf_writer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "stbllm/base/bits.h"
#include "stbllm/base/durable_file.h"
#include "stbllm/base/error.h"
#include "stbllm/base/interrupt.h"

namespace stbllm {
namespace {

namespace fs = std::filesystem;

static_assert(std::endian::native == std::endian::little, "GGUF files are little-endian");

constexpr int64_t kAlignment = 32;  // of tensors, unless a key says otherwise
constexpr int64_t kTernaryBlock = 256, kIntegerBlock = 32;

/// The types of values, with the numbers that GGUF has for them.
enum class ValueType : uint32_t { kUint32 = 4, kInt32 = 5, kFloat32 = 6, kBool = 7, kString = 8, kArray = 9 };

struct TypeRow {
  GgufType type;
  std::string_view name;
  int64_t weights, bytes;  // of a block
};
constexpr TypeRow kTypes[] = {
    {GgufType::kF32, "F32", 1, 4},        {GgufType::kF16, "F16", 1, 2},
    {GgufType::kQ4_0, "Q4_0", 32, 18},    {GgufType::kQ8_0, "Q8_0", 32, 34},
    {GgufType::kBF16, "BF16", 1, 2},      {GgufType::kTQ1_0, "TQ1_0", 256, 54},
    {GgufType::kTQ2_0, "TQ2_0", 256, 66},
};
const TypeRow& row_of(GgufType type) { return *std::ranges::find(kTypes, type, &TypeRow::type); }

template <typename T>
void append(std::string& out, const T& value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}
void append_text(std::string& out, std::string_view text) {
  append(out, uint64_t{text.size()});
  out += text;
}
void append_head(std::string& out, std::string_view key, ValueType type) {
  append_text(out, key);
  append(out, static_cast<uint32_t>(type));
}
void append_array_head(std::string& out, std::string_view key, ValueType of, size_t count) {
  append_head(out, key, ValueType::kArray);
  append(out, static_cast<uint32_t>(of));
  append(out, uint64_t{count});
}

/// Five base-3 digits, the first one the most significant, as a byte from which multiplications by powers of
/// three get them back: ceil(256 digits / 3^5).
uint8_t pack_digits(int digits) { return static_cast<uint8_t>((digits * 256 + 242) / 243); }

/// `count` bytes, each of five weights that are `count` weights apart.
void pack_fives(const int8_t* ternary, int count, std::byte* out) {
  for (int i = 0; i < count; ++i) {
    int digits = 0;
    for (int k = 0; k < 5; ++k) digits = 3 * digits + ternary[k * count + i] + 1;
    out[i] = std::byte{pack_digits(digits)};
  }
}

/// 240 weights in bytes of five: 160 as 32 bytes, 80 as 16; the last 16 in four bytes of four; then d.
void pack_tq1(const int8_t* ternary, uint16_t d, std::byte* out) {
  pack_fives(ternary, 32, out);
  pack_fives(ternary + 160, 16, out + 32);
  for (int i = 0; i < 4; ++i) {
    int digits = 0;
    for (int k = 0; k < 4; ++k) digits = 3 * digits + ternary[240 + k * 4 + i] + 1;
    out[48 + i] = std::byte{pack_digits(3 * digits)};
  }
  std::memcpy(out + 52, &d, sizeof d);
}

/// Twice 32 bytes, each of four weights that are 32 weights apart, the first in the lowest bits; then d.
void pack_tq2(const int8_t* ternary, uint16_t d, std::byte* out) {
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 32; ++i) {
      unsigned bits = 0;
      for (int k = 0; k < 4; ++k)
        bits |= static_cast<unsigned>(ternary[half * 128 + k * 32 + i] + 1) << (2 * k);
      out[half * 32 + i] = static_cast<std::byte>(bits);
    }
  std::memcpy(out + 64, &d, sizeof d);
}

std::span<const std::byte> as_bytes(const std::string& text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

}  // namespace

std::string_view gguf_type_name(GgufType type) { return row_of(type).name; }
int64_t gguf_block_weights(GgufType type) { return row_of(type).weights; }
int64_t gguf_block_bytes(GgufType type) { return row_of(type).bytes; }

bool encode_ternary(GgufType type, std::span<const float> weights, std::span<std::byte> out) {
  const int64_t width = gguf_block_weights(type);
  STBLLM_CHECK(width > 1 && std::ssize(weights) % width == 0, "{} weights in blocks of {}", weights.size(),
               gguf_type_name(type));
  for (int64_t block = 0; block < std::ssize(weights) / width; ++block) {
    const auto of_block = weights.subspan(block * width, width);
    float largest = 0;
    for (const float weight : of_block) largest = std::max(largest, std::abs(weight));
    const uint16_t d = float_to_half(largest);
    if (half_to_float(d) != largest) return false;
    int8_t ternary[kTernaryBlock];
    for (int64_t i = 0; i < width; ++i) {
      if (of_block[i] != 0 && std::abs(of_block[i]) != largest) return false;
      ternary[i] = static_cast<int8_t>((of_block[i] > 0) - (of_block[i] < 0));
    }
    const auto at = out.subspan(block * gguf_block_bytes(type), gguf_block_bytes(type));
    if (type == GgufType::kTQ1_0)
      pack_tq1(ternary, d, at.data());
    else if (type == GgufType::kTQ2_0)
      pack_tq2(ternary, d, at.data());
    else
      encode_integers(type, std::span(ternary, width), std::span(&d, 1), at);
  }
  return true;
}

void encode_integers(GgufType type, std::span<const int8_t> integers, std::span<const uint16_t> scales,
                     std::span<std::byte> out) {
  STBLLM_CHECK(type == GgufType::kQ4_0 || type == GgufType::kQ8_0, "{} holds no integers",
               gguf_type_name(type));
  STBLLM_CHECK(std::ssize(integers) == std::ssize(scales) * kIntegerBlock, "{} integers, {} scales",
               integers.size(), scales.size());
  for (size_t block = 0; block < scales.size(); ++block) {
    std::byte* at = out.data() + static_cast<int64_t>(block) * gguf_block_bytes(type);
    const int8_t* q = integers.data() + block * kIntegerBlock;
    std::memcpy(at, &scales[block], sizeof(uint16_t));
    at += sizeof(uint16_t);
    if (type == GgufType::kQ8_0) {
      std::memcpy(at, q, kIntegerBlock);
    } else {  // weight i in the low half of a byte, weight i + 16 in its high half
      for (int64_t i = 0; i < kIntegerBlock / 2; ++i)
        at[i] = static_cast<std::byte>((q[i] + 8) | (q[i + kIntegerBlock / 2] + 8) << 4);
    }
  }
}

void GgufWriter::set(std::string_view key, std::string_view value) {
  append_head(keys_, key, ValueType::kString);
  append_text(keys_, value);
  ++key_count_;
}
void GgufWriter::set(std::string_view key, uint32_t value) {
  append_head(keys_, key, ValueType::kUint32);
  append(keys_, value);
  ++key_count_;
}
void GgufWriter::set(std::string_view key, float value) {
  append_head(keys_, key, ValueType::kFloat32);
  append(keys_, value);
  ++key_count_;
}
void GgufWriter::set(std::string_view key, bool value) {
  append_head(keys_, key, ValueType::kBool);
  append(keys_, static_cast<uint8_t>(value));
  ++key_count_;
}
void GgufWriter::set(std::string_view key, const std::vector<std::string>& values) {
  append_array_head(keys_, key, ValueType::kString, values.size());
  for (const std::string& value : values) append_text(keys_, value);
  ++key_count_;
}
void GgufWriter::set(std::string_view key, const std::vector<int32_t>& values) {
  append_array_head(keys_, key, ValueType::kInt32, values.size());
  for (const int32_t value : values) append(keys_, value);
  ++key_count_;
}
void GgufWriter::set(std::string_view key, const std::vector<float>& values) {
  append_array_head(keys_, key, ValueType::kFloat32, values.size());
  for (const float value : values) append(keys_, value);
  ++key_count_;
}

void GgufWriter::add(const std::string& name, GgufType type, std::vector<int64_t> shape, Fill fill) {
  int64_t weights = 1;
  for (const int64_t size : shape) weights *= size;
  STBLLM_CHECK(!shape.empty() && shape.back() % gguf_block_weights(type) == 0,
               "{}: rows are no multiple of the {} weights of a block of {}", name, gguf_block_weights(type),
               gguf_type_name(type));
  const int64_t bytes = weights / gguf_block_weights(type) * gguf_block_bytes(type);
  tensors_.push_back({name, type, std::move(shape), std::move(fill), bytes});
}

void GgufWriter::write(const fs::path& path, bool force) const {
  if (!force) refuse_existing_output(path);
  std::string head = "GGUF";
  append(head, uint32_t{3});
  append(head, uint64_t{tensors_.size()});
  append(head, key_count_);
  head += keys_;
  int64_t offset = 0;
  for (const Tensor& tensor : tensors_) {
    append_text(head, tensor.name);
    append(head, static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size)  // innermost first
      append(head, static_cast<uint64_t>(*size));
    append(head, static_cast<uint32_t>(tensor.type));
    append(head, static_cast<uint64_t>(offset));
    offset += round_up(tensor.bytes, kAlignment);
  }
  head.resize(static_cast<size_t>(round_up(std::ssize(head), kAlignment)), '\0');

  TemporaryFile file(path);
  file.write(as_bytes(head));
  for (const Tensor& tensor : tensors_) {
    check_interrupt();
    std::vector<std::byte> bytes(static_cast<size_t>(round_up(tensor.bytes, kAlignment)));
    tensor.fill(std::span(bytes).first(static_cast<size_t>(tensor.bytes)));
    file.write(bytes);
  }
  file.rename(path);
}

}  // namespace stbllm
