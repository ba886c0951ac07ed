#include "stbllm/calibrate/pack_weight.h"

#include <ATen/Parallel.h>

#include <cstring>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"

namespace stbllm {
namespace {

/// The bytes of all planes, one buffer each; a StructuredBinaryMatrix views and owns them.
struct PlaneBuffers {
  std::array<std::vector<std::byte>, kPlaneCount> bytes;
  std::byte* operator[](Plane plane) { return bytes[static_cast<size_t>(plane)].data(); }
};

void store_halves(std::byte* out, const at::Tensor& values) {
  const at::Tensor half = values.to(at::kHalf).contiguous();
  std::memcpy(out, half.data_ptr(), half.nbytes());
}

at::Tensor load_halves(std::span<const std::byte> plane, at::IntArrayRef shape) {
  at::Tensor half = at::empty(shape, at::kHalf);
  std::memcpy(half.data_ptr(), plane.data(), half.nbytes());
  return half.to(at::kFloat);
}

void store_columns(std::byte* out, const at::Tensor& columns) {
  const at::Tensor c = columns.to(at::kInt).contiguous();
  std::memcpy(out, c.data_ptr(), c.nbytes());
}

/// Content of one group of `symbols`; a narrower last group keeps virtual columns once all real ones are
/// kept.
GroupSymbols group_symbols(const int8_t* symbols, int width, NmPattern nm) {
  GroupSymbols result;
  int kept = 0;
  for (int c = 0; c < width; ++c) {
    if (symbols[c] == 0) continue;
    result.position[kept] = static_cast<uint8_t>(c);
    result.level[kept] = static_cast<uint8_t>(std::abs(symbols[c]) - 1);
    result.sign[kept] = symbols[c] < 0;
    ++kept;
  }
  for (int c = width; c < nm.group && kept < nm.keep; ++c) result.position[kept++] = static_cast<uint8_t>(c);
  STBLLM_CHECK(kept == nm.keep, "{} kept weights in a group of {}", kept, nm.str());
  return result;
}

}  // namespace

Layout layout_of(const LinearSpec& linear, const Scheme& scheme, const Method& method) {
  return {.rows = linear.rows,
          .cols = linear.cols,
          .nm = scheme.nm,
          .levels = scheme.levels,
          .column_block = column_block(method),
          .scale_bits = scale_bits(method)};
}

Layout layout_of(const BinarizedWeight& weight) {
  return {.rows = weight.rows(),
          .cols = weight.cols(),
          .nm = weight.nm,
          .levels = weight.levels,
          .column_block = weight.column_block,
          .scale_bits = weight.scale_bits,
          .salient = weight.has_salient() ? weight.salient_columns.numel() : 0,
          .outliers = weight.has_outliers() ? weight.outlier_columns.numel() : 0};
}

StructuredBinaryMatrix pack_weight(const BinarizedWeight& weight, std::string_view name) {
  STBLLM_CHECK(!weight.unpackable.defined(), "{} has no packed form", name);
  const Layout layout = layout_of(weight);
  const auto buffers = std::make_shared<PlaneBuffers>();
  StructuredBinaryMatrix::Planes planes;
  for (int p = 0; p < kPlaneCount; ++p) buffers->bytes[p].resize(plane_bytes(layout, static_cast<Plane>(p)));
  for (int p = 0; p < kPlaneCount; ++p) planes[p] = buffers->bytes[p];

  const at::Tensor symbols = weight.symbols.contiguous();
  at::parallel_for(0, layout.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int8_t* s = symbols.data_ptr<int8_t>() + row * layout.cols;
      std::byte* out = (*buffers)[Plane::kCodes] + row * layout.code_row_bytes();
      for (int64_t g = 0; g < layout.groups(); ++g) {
        const int64_t first = g * layout.nm.group;
        const int width = static_cast<int>(std::min<int64_t>(layout.nm.group, layout.cols - first));
        const uint64_t code =
            encode_group(layout.nm, layout.levels, group_symbols(s + first, width, layout.nm));
        write_bits(out, g * layout.code_bits(), layout.code_bits(), code);
      }
    }
  });
  if (layout.scale_bits == 16) {
    store_halves((*buffers)[Plane::kScales], weight.scales);
  } else {
    const at::Tensor codes = weight.scale_codes.contiguous();
    for (int64_t row = 0; row < layout.rows; ++row)
      for (int64_t b = 0; b < layout.column_blocks(); ++b)
        write_bits((*buffers)[Plane::kScaleCodes] + row * layout.scale_code_row_bytes(),
                   b * layout.scale_bits, layout.scale_bits,
                   codes.data_ptr<uint8_t>()[row * layout.column_blocks() + b]);
    store_halves((*buffers)[Plane::kRowScales], weight.row_scales);
    store_halves((*buffers)[Plane::kLevels], weight.level_values);
  }
  if (layout.salient > 0) {
    store_columns((*buffers)[Plane::kSalientColumns], weight.salient_columns);
    const at::Tensor signs = weight.salient_signs.contiguous();
    const int64_t stride = ceil_div(layout.rows, 8);
    for (int64_t k = 0; k < layout.salient; ++k)
      for (int64_t row = 0; row < layout.rows; ++row)
        write_bits((*buffers)[Plane::kSalientSigns] + k * stride, row, 1,
                   signs.data_ptr<int8_t>()[k * layout.rows + row] < 0);
  }
  if (layout.outliers > 0) {
    store_columns((*buffers)[Plane::kOutlierColumns], weight.outlier_columns);
    store_halves((*buffers)[Plane::kOutlierValues], weight.outlier_values);
  }
  return StructuredBinaryMatrix(layout, planes, buffers, name);
}

at::Tensor unpack_dense(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  at::Tensor dense = at::empty({layout.rows, layout.cols}, at::kFloat);
  at::parallel_for(0, layout.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      matrix.decode_row(row, dense.data_ptr<float>() + row * layout.cols);
  });
  return dense;
}

BinarizedWeight unpack_weight(const StructuredBinaryMatrix& matrix) {
  const Layout& layout = matrix.layout();
  BinarizedWeight weight;
  weight.nm = layout.nm;
  weight.levels = layout.levels;
  weight.column_block = layout.column_block;
  weight.scale_bits = layout.scale_bits;
  weight.symbols = at::zeros({layout.rows, layout.cols}, at::kChar);
  at::parallel_for(0, layout.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t g = 0; g < layout.groups(); ++g) {
        const GroupSymbols symbols = decode_group(layout.nm, layout.levels, matrix.code(row, g));
        for (int k = 0; k < layout.nm.keep; ++k) {
          const int64_t col = g * layout.nm.group + symbols.position[k];
          if (col >= layout.cols) continue;
          const int symbol = 1 + symbols.level[k];
          weight.symbols.data_ptr<int8_t>()[row * layout.cols + col] =
              static_cast<int8_t>(symbols.sign[k] ? -symbol : symbol);
        }
      }
  });
  if (layout.scale_bits == 16) {
    weight.scales = load_halves(matrix.plane(Plane::kScales),
                                {layout.rows, layout.column_blocks(), layout.scale_slots()});
  } else {
    weight.scale_codes = at::empty({layout.rows, layout.column_blocks()}, at::kByte);
    for (int64_t row = 0; row < layout.rows; ++row)
      for (int64_t b = 0; b < layout.column_blocks(); ++b)
        weight.scale_codes.data_ptr<uint8_t>()[row * layout.column_blocks() + b] = static_cast<uint8_t>(
            read_bits(matrix.plane(Plane::kScaleCodes).data() + row * layout.scale_code_row_bytes(),
                      b * layout.scale_bits, layout.scale_bits));
    weight.row_scales = load_halves(matrix.plane(Plane::kRowScales), {layout.rows});
    weight.level_values = load_halves(matrix.plane(Plane::kLevels), {layout.scale_slots()});
    weight.expand_scales();
  }
  const auto columns = [](std::span<const int32_t> list) {
    return at::tensor(at::ArrayRef<int32_t>(list.data(), list.size()), at::kInt);
  };
  if (layout.salient > 0) {
    weight.salient_columns = columns(matrix.salient_columns());
    weight.salient_signs = at::empty({layout.salient, layout.rows}, at::kChar);
    for (int64_t k = 0; k < layout.salient; ++k)
      for (int64_t row = 0; row < layout.rows; ++row)
        weight.salient_signs.data_ptr<int8_t>()[k * layout.rows + row] = matrix.salient_sign(k, row) ? -1 : 1;
  }
  if (layout.outliers > 0) {
    weight.outlier_columns = columns(matrix.outlier_columns());
    weight.outlier_values = load_halves(matrix.plane(Plane::kOutlierValues), {layout.outliers, layout.rows});
  }
  return weight;
}

}  // namespace stbllm
