#pragma once
// Random valid matrices, determined by a layout and a seed.

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "stbllm/base/bits.h"
#include "stbllm/pack/structured_binary_matrix.h"

namespace stbllm::test {

/// What the scales, levels and outliers of a random matrix are.
enum class Content {
  kReal,   ///< any finite values, a zero scale here and there
  kExact,  ///< powers of two in 1/8 .. 4 and outliers that are multiples of 1/4 up to 4, so that sums of
           ///< products with small integers are exact in float32 whatever their order
};

/// Planes that can be changed before they become a matrix.
struct OwnedPlanes {
  std::array<std::vector<std::byte>, kPlaneCount> bytes;

  std::vector<std::byte>& operator[](Plane plane) { return bytes[static_cast<size_t>(plane)]; }
  StructuredBinaryMatrix matrix(const Layout& layout) const {
    auto owner = std::make_shared<const OwnedPlanes>(*this);
    StructuredBinaryMatrix::Planes views;
    std::ranges::copy(owner->bytes, views.begin());
    return {layout, views, owner, "random matrix"};
  }
};

namespace detail {

inline void store_half(std::vector<std::byte>& plane, int64_t index, float value) {
  const uint16_t bits = float_to_half(value);
  std::memcpy(plane.data() + 2 * index, &bits, sizeof bits);
}

inline void store_columns(std::vector<std::byte>& plane, const std::vector<int32_t>& columns) {
  std::ranges::copy(std::as_bytes(std::span(columns)), plane.begin());
}

}  // namespace detail

inline OwnedPlanes random_planes(const Layout& layout, uint64_t seed, Content content = Content::kReal) {
  std::mt19937_64 rng(seed);
  const auto below = [&](int64_t bound) {
    return static_cast<int64_t>(rng() % static_cast<uint64_t>(bound));
  };
  const bool exact = content == Content::kExact;
  const auto random_scale = [&](int lowest_exponent, int exponents) {
    if (exact) return std::ldexp(1.0f, lowest_exponent + static_cast<int>(below(exponents)));
    return below(16) == 0 ? 0.0f : 0.001f + 1e-6f * static_cast<float>(below(100000));
  };

  OwnedPlanes planes;
  for (int i = 0; i < kPlaneCount; ++i)
    planes.bytes[i].resize(static_cast<size_t>(plane_bytes(layout, static_cast<Plane>(i))));

  std::vector<int32_t> columns(static_cast<size_t>(layout.cols));
  std::iota(columns.begin(), columns.end(), 0);
  std::ranges::shuffle(columns, rng);
  std::vector<int32_t> salient(columns.begin(), columns.begin() + layout.salient);
  std::vector<int32_t> outliers(columns.begin() + layout.salient,
                                columns.begin() + layout.salient + layout.outliers);
  std::ranges::sort(salient);
  std::ranges::sort(outliers);
  detail::store_columns(planes[Plane::kSalientColumns], salient);
  detail::store_columns(planes[Plane::kOutlierColumns], outliers);

  const int group_size = layout.nm.group, keep = layout.nm.keep;
  for (int64_t row = 0; row < layout.rows; ++row)
    for (int64_t group = 0; group < layout.groups(); ++group) {
      const auto real = static_cast<int>(std::min<int64_t>(group_size, layout.cols - group * group_size));
      std::array<uint8_t, 16> order;  // real columns in random order, then virtual ones in random order
      std::iota(order.begin(), order.end(), uint8_t{0});
      std::shuffle(order.begin(), order.begin() + real, rng);
      std::shuffle(order.begin() + real, order.begin() + group_size, rng);
      std::array<bool, 16> kept{};
      for (int k = 0; k < keep; ++k) kept[order[k]] = true;
      GroupSymbols symbols;
      for (int position = 0, k = 0; position < group_size; ++position) {
        if (!kept[position]) continue;
        const auto col = static_cast<int32_t>(group * group_size + position);
        symbols.position[k] = static_cast<uint8_t>(position);
        symbols.sign[k] = static_cast<uint8_t>(below(2));
        symbols.level[k] =
            std::ranges::binary_search(salient, col) ? 0 : static_cast<uint8_t>(below(layout.levels));
        ++k;
      }
      write_bits(planes[Plane::kCodes].data() + row * layout.code_row_bytes(), group * layout.code_bits(),
                 layout.code_bits(), encode_group(layout.nm, layout.levels, symbols));
    }

  const int64_t blocks = layout.column_blocks(), slots = layout.scale_slots();
  if (layout.scale_bits == 16) {
    for (int64_t i = 0; i < layout.rows * blocks * slots; ++i)
      detail::store_half(planes[Plane::kScales], i, random_scale(-3, 6));
  } else {
    const int64_t step = exact ? int64_t{1} << (layout.scale_bits - 2) : 1;  // whole powers of two
    for (int64_t row = 0; row < layout.rows; ++row) {
      detail::store_half(planes[Plane::kRowScales], row, random_scale(0, 2));
      for (int64_t block = 0; block < blocks; ++block)
        write_bits(planes[Plane::kScaleCodes].data() + row * layout.scale_code_row_bytes(),
                   block * layout.scale_bits, layout.scale_bits,
                   static_cast<uint64_t>(step * below((int64_t{1} << layout.scale_bits) / step)));
    }
    for (int64_t slot = 0; slot < slots; ++slot)
      detail::store_half(planes[Plane::kLevels], slot, random_scale(0, 2));
  }

  for (int64_t i = 0; i < layout.salient; ++i)
    for (int64_t row = 0; row < layout.rows; ++row)
      write_bits(planes[Plane::kSalientSigns].data() + i * ceil_div(layout.rows, 8), row, 1,
                 static_cast<uint64_t>(below(2)));
  for (int64_t i = 0; i < layout.outliers * layout.rows; ++i)
    detail::store_half(planes[Plane::kOutlierValues], i,
                       static_cast<float>(below(33) - 16) * (exact ? 0.25f : 0.0173f));
  return planes;
}

inline StructuredBinaryMatrix random_matrix(const Layout& layout, uint64_t seed,
                                            Content content = Content::kReal) {
  return random_planes(layout, seed, content).matrix(layout);
}

}  // namespace stbllm::test
