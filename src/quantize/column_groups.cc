#include "column_groups.h"

#include <algorithm>

namespace stbllm {
namespace {

/// U_gg^-1 of an upper triangular (width, width) block, row-major, in double.
std::array<double, 256> invert_upper(const float* upper, int64_t stride, int width) {
  std::array<double, 256> inverse{};
  for (int j = 0; j < width; ++j) {
    inverse[j * width + j] = 1.0 / upper[j * stride + j];
    for (int i = j - 1; i >= 0; --i) {
      double sum = 0;
      for (int k = i + 1; k <= j; ++k) sum += upper[i * stride + k] * inverse[k * width + j];
      inverse[i * width + j] = -sum / upper[i * stride + i];
    }
  }
  return inverse;
}

/// Groups of a column block `block_width` wide; `set_metric` fills in what is particular.
template <typename SetMetric>
std::vector<ColumnGroup> make_groups(const LeanWeight& lean, const GroupCodebooks& codebooks,
                                     int64_t block_width, const SetMetric& set_metric) {
  std::vector<ColumnGroup> groups;
  for (int first = 0; first < block_width; first += lean.nm.group) {
    ColumnGroup& group = groups.emplace_back();
    group.first = first;
    group.width = static_cast<int>(std::min<int64_t>(lean.nm.group, block_width - first));
    set_metric(group);
    if (const GroupCodebook* book = codebooks.find(group.width))
      group.table.emplace(*book, lean.level_values, group.metric.data(), group.width);
  }
  return groups;
}

}  // namespace

std::vector<ColumnGroup> groups_by_factor(const LeanWeight& lean, const GroupCodebooks& codebooks,
                                          const BlockColumns& block, const at::Tensor& factor,
                                          Compensate compensate) {
  return make_groups(lean, codebooks, block.width, [&](ColumnGroup& group) {
    const int width = group.width;
    const float* u = compensate == Compensate::kNone
                         ? nullptr
                         : factor.const_data_ptr<float>() + group.first * (block.width + 1);
    std::array<double, 256> inverse{};
    if (compensate == Compensate::kColumn)
      inverse = invert_upper(u, block.width, width);
    else
      for (int i = 0; i < width; ++i)
        inverse[i * width + i] = u == nullptr ? 1.0 : 1.0 / u[i * (block.width + 1)];
    for (int i = 0; i < width; ++i)
      for (int j = 0; j < width; ++j) {
        double sum = 0;
        for (int k = 0; k < width; ++k) sum += inverse[i * width + k] * inverse[j * width + k];
        group.metric[i * width + j] = sum;
        group.metric_f[i * width + j] = static_cast<float>(sum);
        group.transposed[j * width + i] = static_cast<float>(inverse[i * width + j]);
      }
  });
}

std::vector<ColumnGroup> groups_by_hessian(const LeanWeight& lean, const GroupCodebooks& codebooks,
                                           const BlockColumns& block, const at::Tensor& hessian) {
  return make_groups(lean, codebooks, block.width, [&](ColumnGroup& group) {
    const float* h = hessian.const_data_ptr<float>() + group.first * (block.width + 1);
    for (int i = 0; i < group.width; ++i)
      for (int j = 0; j < group.width; ++j) group.metric[i * group.width + j] = h[i * block.width + j];
  });
}

}  // namespace stbllm
