#pragma once
// Activations in and results out.
//
// Kernels multiply in fp16. Activations are scaled by a power of two per token so that the largest is near
// 2^13: fp16 and bf16 values within 2^27 of the largest keep all their bits, smaller ones are rounded to
// multiples of 2^-38 of it, fp32 values are rounded to 11 bits. Range is never an issue, and one kernel
// serves all types.

#include "device_layout.h"
#include "ptx.cuh"

namespace stbllm::cuda {

/// Two power-of-two factors whose product is 1, or NaN for `down` where a value is not finite.
struct TokenScale {
  float up, down;

  /// From the bits of the largest magnitude of a token.
  STBLLM_DEVICE explicit TokenScale(uint32_t largest) {
    constexpr uint32_t kTarget = 127 + 13;
    uint32_t exponent = largest >> 23;         // biased
    exponent = exponent < 20 ? 20 : exponent;  // 0 and denormals: any factor that is finite
    up = bits_float((127 + kTarget - exponent) << 23);
    down = bits_float((127 + exponent - kTarget) << 23);
    // A value that is infinite or no number makes the token's results NaN, also where its column is pruned.
    if (exponent == 255) down = bits_float(0x7fc00000u);
  }
};

STBLLM_DEVICE float load_element(const void* data, ElementType type, int64_t index) {
  if (type == ElementType::kFloat32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return type == ElementType::kFloat16 ? half_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

/// Activations of eight neighbouring columns, counted through the tiles and then through the extra columns.
STBLLM_DEVICE void load_activations(const WeightView& weights, const InputView& input, int token, int column,
                                    float (&value)[8]) {
  const int64_t row = static_cast<int64_t>(token) * weights.cols;
  const int coded_columns = weights.column_tiles * kTileColumns;
  if (column >= coded_columns) {
    for (int i = 0; i < 8; ++i) {
      const int extra = column - coded_columns + i;
      const int source = extra < kExtraColumns * weights.extra_steps ? weights.extra_columns[extra] : -1;
      value[i] = source < 0 ? 0.0f : load_element(input.data, input.type, row + source);
    }
    return;
  }
  if (input.aligned && column + 8 <= weights.cols) {
    if (input.type == ElementType::kFloat32) {
      const auto* from =
          reinterpret_cast<const Words4*>(static_cast<const float*>(input.data) + row + column);
      const Words4 words[2] = {from[0], from[1]};
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = bits_float(words[i / 4].word[i % 4]);
    } else {
      const Words4 words =
          *reinterpret_cast<const Words4*>(static_cast<const uint16_t*>(input.data) + row + column);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = words.word[i / 2] >> (16 * (i % 2)) & 0xffffu;
        value[i] = input.type == ElementType::kFloat16 ? half_to_float(static_cast<uint16_t>(bits))
                                                       : bits_float(bits << 16);
      }
    }
  } else {
    for (int i = 0; i < 8; ++i) {
      const int source = weights.source_column(column + i);
      value[i] = source < 0 ? 0.0f : load_element(input.data, input.type, row + source);
    }
  }
  if (weights.extra_steps > 0) {
    const uint32_t taken = weights.taken[column / 8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (taken >> i & 1u) value[i] = 0.0f;
  }
}

/// The bits of the largest magnitude.
STBLLM_DEVICE uint32_t largest_of(const float (&value)[8]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t bits = float_bits(value[i]) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

/// Eight halves in four words.
STBLLM_DEVICE Words4 pack_halves(const float (&value)[8], float factor) {
  Words4 words;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words.word[i] = static_cast<uint32_t>(float_to_half(value[2 * i] * factor)) |
                    static_cast<uint32_t>(float_to_half(value[2 * i + 1] * factor)) << 16;
  return words;
}

STBLLM_DEVICE void store_result(const OutputView& output, int64_t index, float value) {
  if (output.type == ElementType::kFloat32)
    static_cast<float*>(output.data)[index] = value;
  else
    static_cast<uint16_t*>(output.data)[index] =
        output.type == ElementType::kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
}

/// Two neighbours at once where both exist and their address allows it.
STBLLM_DEVICE void store_neighbours(const OutputView& output, int64_t index, bool both, float first,
                                    float second) {
  if (both && index % 2 == 0 && output.type != ElementType::kFloat32) {
    const bool half = output.type == ElementType::kFloat16;
    const uint32_t low = half ? float_to_half(first) : float_to_bfloat16(first);
    const uint32_t high = half ? float_to_half(second) : float_to_bfloat16(second);
    static_cast<uint32_t*>(output.data)[index / 2] = low | high << 16;
    return;
  }
  store_result(output, index, first);
  if (both) store_result(output, index + 1, second);
}

inline constexpr int kStageThreads = 256;

/// Scales and converts token block_x() for the products of several tokens. `staged` (tokens, staged_width)
/// fp16, `token_scales` (tokens).
STBLLM_DEVICE void stage_token(const WeightView& weights, const InputView& input, uint16_t* staged,
                               float* token_scales) {
  const int token = block_x(), thread = thread_index(), pieces = staged_width(weights) / 8;
  auto* warp_largest = reinterpret_cast<uint32_t*>(shared_memory());
  float value[8];
  uint32_t largest = 0;
  for (int piece = thread; piece < pieces; piece += kStageThreads) {
    load_activations(weights, input, token, 8 * piece, value);
    const uint32_t bits = largest_of(value);
    largest = bits > largest ? bits : largest;
  }
  largest = warp_max(largest);
  if (thread % 32 == 0) warp_largest[thread / 32] = largest;
  sync_threads();
  for (int warp = 0; warp < kStageThreads / 32; ++warp)
    largest = warp_largest[warp] > largest ? warp_largest[warp] : largest;

  const TokenScale scale(largest);
  if (thread == 0) token_scales[token] = scale.down;
  auto* to = reinterpret_cast<Words4*>(staged) + static_cast<int64_t>(token) * pieces;
  for (int piece = thread; piece < pieces; piece += kStageThreads) {
    load_activations(weights, input, token, 8 * piece, value);
    to[piece] = pack_halves(value, scale.up);
  }
}

}  // namespace stbllm::cuda
