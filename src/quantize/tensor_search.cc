#include "stbllm/quantize/tensor_search.h"

#include <algorithm>
#include <map>
#include <numeric>

#include "column_groups.h"
#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"

namespace stbllm {
namespace {

/// States times rows whose costs exist at a time.
constexpr int64_t kCostsPerPass = 1 << 26;

/// Groups of a column block where the matrices are: of each the codebook and the half energies of its states.
struct DeviceGroups {
  std::map<int, TensorCodebook> codebooks;  // by width
  std::vector<at::Tensor> half_energy;

  DeviceGroups(const std::vector<ColumnGroup>& groups, std::span<const float> level_values, at::Device device) {
    for (const ColumnGroup& group : groups) {
      STBLLM_CHECK(group.table.has_value(), "the states of a group of {} columns are not enumerated", group.width);
      codebooks.try_emplace(group.width, *group.table->codebook, level_values, group.width, device);
      half_energy.push_back(at::tensor(group.table->half_energy, at::kFloat).to(device));
    }
  }
  at::Tensor best(const std::vector<ColumnGroup>& groups, size_t g, const at::Tensor& target, const at::Tensor& scale) const {
    return codebooks.at(groups[g].width).best(half_energy[g], target, scale);
  }
};

at::Tensor square_matrix(const std::array<float, 256>& values, int width, at::Device device) {
  return at::tensor(at::ArrayRef<float>(values.data(), static_cast<size_t>(width * width)), at::kFloat).view({width, width}).to(device);
}

}  // namespace

TensorCodebook::TensorCodebook(const GroupCodebook& codebook, std::span<const float> level_values, int width, at::Device device) {
  symbols_ = at::zeros({codebook.states(), width}, at::kChar);
  for (int64_t state = 0; state < codebook.states(); ++state)
    for (int k = 0; k < codebook.kept(); ++k)
      symbols_.data_ptr<int8_t>()[state * width + codebook.positions(state)[k]] = codebook.symbols(state)[k];
  symbols_ = symbols_.to(device);
  coefficients_ = unit_values(symbols_, level_values);
}

at::Tensor TensorCodebook::best(const at::Tensor& half_energy, const at::Tensor& target, const at::Tensor& scale) const {
  const int64_t rows = target.size(1), states = symbols_.size(0), pass = std::max<int64_t>(1, kCostsPerPass / states);
  at::Tensor symbols = at::empty(target.sizes(), symbols_.options());
  for (int64_t first = 0; first < rows; first += pass) {
    const int64_t count = std::min(pass, rows - first);
    const at::Tensor dot = coefficients_.mm(target.narrow(1, first, count));                    // (states, count)
    const at::Tensor cost = half_energy.unsqueeze(1) * scale.narrow(0, first, count) - dot.abs();  // over 2 a, as in scan_states()
    const at::Tensor state = cost.argmin(0);
    const at::Tensor sign = 1 - 2 * dot.gather(0, state.unsqueeze(0)).lt(0).to(at::kChar);  // (1, count)
    symbols.narrow(1, first, count).copy_(symbols_.index_select(0, state).t() * sign);
  }
  return symbols;
}

namespace by_tensors {

void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate) {
  const int64_t cols = lean.cols();
  const at::Device device = lean.target.device();
  const auto levels = static_cast<int>(lean.level_values.size());
  const GroupCodebooks codebooks(lean.nm, levels, cols);
  const float mean_level = std::accumulate(lean.level_values.begin(), lean.level_values.end(), 0.f) / static_cast<float>(levels);
  const at::Tensor work = lean.target.clone();

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const auto [start, width, rest] = block;
    const std::vector<ColumnGroup> groups =
        groups_by_factor(lean, codebooks, block, compensate == Compensate::kNone ? at::Tensor() : block.host_part(upper), compensate);
    const DeviceGroups search(groups, lean.level_values, device);
    const at::Tensor weights = work.narrow(0, start, width);
    std::vector<at::Tensor> metrics;
    for (const ColumnGroup& group : groups) metrics.push_back(square_matrix(group.metric_f, group.width, device));
    const auto of_group = [&](size_t g) { return weights.narrow(0, groups[g].first, groups[g].width); };

    // The block's scale on its current weights: codes and scale in turn, without feedback, from the mean kept magnitude.
    at::Tensor top = at::zeros({lean.rows()}, weights.options());
    int kept = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      const int keep = std::min(lean.nm.keep, groups[g].width);
      top = top + std::get<0>(of_group(g).abs().topk(keep, 0)).sum(0);
      kept += keep;
    }
    at::Tensor scale = (top / (static_cast<float>(kept) * mean_level)).clamp_min(kSmallestScale);
    for (int round = 1; round < kEncodeSearches; ++round) {
      top = at::zeros_like(top);
      at::Tensor bottom = at::zeros_like(top);
      for (size_t g = 0; g < groups.size(); ++g) {
        const at::Tensor target = metrics[g].mm(of_group(g));
        const at::Tensor values = unit_values(search.best(groups, g, target, scale), lean.level_values) * scale;
        top = top + (values * target).sum(0);
        bottom = bottom + (values * metrics[g].mm(values)).sum(0);
      }
      scale = at::where(bottom.gt(0).logical_and(top.gt(0)), (scale * (top / bottom)).clamp_min(kSmallestScale), scale);
    }
    const at::Tensor wanted = scale.cpu().contiguous();
    for (int64_t row = 0; row < lean.rows(); ++row) lean.set_scale(b, row, wanted.const_data_ptr<float>()[row]);
    scale = lean.scales[b].to(device);

    at::Tensor errors = at::zeros({width, lean.rows()}, weights.options());
    for (size_t g = 0; g < groups.size(); ++g) {
      const ColumnGroup& group = groups[g];
      const at::Tensor symbols = search.best(groups, g, metrics[g].mm(of_group(g)), scale);
      const at::Tensor error = square_matrix(group.transposed, group.width, device).mm(of_group(g) - unit_values(symbols, lean.level_values) * scale);
      lean.symbols.narrow(0, start + group.first, group.width).copy_(symbols);
      errors.narrow(0, group.first, group.width).copy_(error);
      const int64_t next = group.first + group.width;
      if (compensate == Compensate::kColumn && next < width)
        weights.narrow(0, next, width - next)
            .addmm_(upper.narrow(0, start + group.first, group.width).narrow(1, start + next, width - next).t(), error, 1, -1);
    }
    if (compensate == Compensate::kNone || rest == 0) continue;
    const StageTimer timer("products", 2.0 * static_cast<double>(rest * width * lean.rows()));
    work.narrow(0, start + width, rest).addmm_(upper.narrow(0, start, width).narrow(1, start + width, rest).t(), errors, 1, -1);
  }
}

double descend(LeanWeight& lean) {
  const int64_t cols = lean.cols();
  const at::Device device = lean.target.device();
  const GroupCodebooks codebooks(lean.nm, static_cast<int>(lean.level_values.size()), cols);
  const at::Tensor dense = lean.dense();
  const at::Tensor gradient = [&] {
    const StageTimer timer("products", 2.0 * static_cast<double>(cols * cols * lean.rows()));
    return lean.hessian.mm(dense - lean.target);
  }();
  at::Tensor changed = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(device));

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const auto [start, width, rest] = block;
    const std::vector<ColumnGroup> groups = groups_by_hessian(lean, codebooks, block, block.host_part(lean.hessian));
    const DeviceGroups search(groups, lean.level_values, device);
    const at::Tensor scale = lean.scales[b].to(device);
    const at::Tensor change = at::zeros({width, lean.rows()}, dense.options());
    for (size_t g = 0; g < groups.size(); ++g) {
      const int64_t first = start + groups[g].first, own = groups[g].width, later = start + width - first - own;
      const at::Tensor from_group = lean.hessian.narrow(0, first, own), q = dense.narrow(0, first, own);
      const at::Tensor target = from_group.narrow(1, first, own).mm(q) - gradient.narrow(0, first, own);
      const at::Tensor symbols = search.best(groups, g, target, scale), old = lean.symbols.narrow(0, first, own);
      const at::Tensor delta = unit_values(symbols, lean.level_values) * scale - q;
      changed += symbols.ne(old).sum();
      old.copy_(symbols);
      change.narrow(0, groups[g].first, own).copy_(delta);
      if (later > 0) gradient.narrow(0, first + own, later).addmm_(from_group.narrow(1, first + own, later).t(), delta);
    }
    if (rest == 0) continue;
    const StageTimer timer("products", 2.0 * static_cast<double>(rest * width * lean.rows()));
    gradient.narrow(0, start + width, rest).addmm_(lean.hessian.narrow(0, start + width, rest).narrow(1, start, width), change);
  }
  return changed.item<double>() / static_cast<double>(lean.rows() * cols);
}

}  // namespace by_tensors

}  // namespace stbllm
