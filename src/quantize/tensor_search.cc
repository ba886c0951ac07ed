#include "stbllm/quantize/tensor_search.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>

#include "column_groups.h"
#include "stbllm/base/error.h"
#include "stbllm/base/profile.h"

namespace stbllm {
namespace {

/// States times rows whose costs exist at a time.
constexpr int64_t kCostsPerPass = 1 << 22;

/// What a group got: symbols, int8 (width, rows), and their level values, float32.
struct Found {
  at::Tensor symbols, units;
};

/// The search of best_codes() for all rows at once.
class TensorCodebook {
 public:
  TensorCodebook(const GroupCodebook& codebook, std::span<const float> level_values, int width,
                 at::Device device)
      : symbols_(at::zeros({codebook.states(), width}, at::kChar)) {
    for (int64_t state = 0; state < codebook.states(); ++state)
      for (int k = 0; k < codebook.kept(); ++k)
        symbols_.data_ptr<int8_t>()[state * width + codebook.positions(state)[k]] =
            codebook.symbols(state)[k];
    units_ = unit_values(symbols_, level_values).to(device);
    symbols_ = symbols_.to(device);
  }

  /// half_energy (states) as GroupTable has it, target (width, rows), scale (rows).
  Found best(const at::Tensor& half_energy, const at::Tensor& target, const at::Tensor& scale) const {
    const int64_t rows = target.size(1), states = symbols_.size(0),
                  pass = std::max<int64_t>(1, kCostsPerPass / states);
    Found found{at::empty(target.sizes(), symbols_.options()), at::empty_like(target)};
    for (int64_t first = 0; first < rows; first += pass) {
      const int64_t count = std::min(pass, rows - first);
      const at::Tensor dot = units_.mm(target.narrow(1, first, count));  // (states, count)
      const at::Tensor cost = half_energy.unsqueeze(1) * scale.narrow(0, first, count) -
                              dot.abs();  // over 2 a, as in scan_states()
      const at::Tensor state = cost.argmin(0);
      const at::Tensor sign = 1 - 2 * dot.gather(0, state.unsqueeze(0)).lt(0).to(at::kChar);  // (1, count)
      found.symbols.narrow(1, first, count).copy_(symbols_.index_select(0, state).t() * sign);
      found.units.narrow(1, first, count).copy_(units_.index_select(0, state).t() * sign);
    }
    return found;
  }

 private:
  at::Tensor symbols_;  // int8 (states, width), zeros where pruned
  at::Tensor units_;    // float32, their level values
};

/// The codebooks of a matrix where it is, by width.
std::map<int, TensorCodebook> codebooks_on_device(const LeanWeight& lean, const GroupCodebooks& codebooks) {
  std::map<int, TensorCodebook> result;
  for (const int width : {lean.nm.group, static_cast<int>(lean.cols() % lean.nm.group)})
    if (const GroupCodebook* codebook = codebooks.find(width))
      result.emplace(width, TensorCodebook(*codebook, lean.level_values, width, lean.target.device()));
  STBLLM_CHECK(!result.empty(), "the states of {} with {} levels are not enumerated", lean.nm.str(),
               lean.level_values.size());
  return result;
}

/// Values of each group, sent to the device in one go.
template <typename ValuesOf>
std::vector<at::Tensor> send(const std::vector<ColumnGroup>& groups, at::Device device,
                             const ValuesOf& values_of) {
  std::vector<float> all;
  std::vector<int64_t> sizes;
  for (const ColumnGroup& group : groups) {
    const std::span<const float> values = values_of(group);
    all.insert(all.end(), values.begin(), values.end());
    sizes.push_back(std::ssize(values));
  }
  return at::tensor(all, at::kFloat).to(device).split_with_sizes(sizes);
}
std::vector<at::Tensor> send_half_energies(const std::vector<ColumnGroup>& groups, at::Device device) {
  return send(groups, device, [](const ColumnGroup& group) { return std::span(group.table->half_energy); });
}
/// A (width, width) matrix of each.
std::vector<at::Tensor> send_matrices(const std::vector<ColumnGroup>& groups, at::Device device,
                                      std::array<float, 256> ColumnGroup::*matrix) {
  std::vector<at::Tensor> sent = send(groups, device, [&](const ColumnGroup& group) {
    return std::span(group.*matrix).first(static_cast<size_t>(group.width * group.width));
  });
  for (size_t g = 0; g < groups.size(); ++g) sent[g] = sent[g].view({groups[g].width, groups[g].width});
  return sent;
}

}  // namespace

// refit is in refit.cc: all but the sums is the same.
namespace by_tensors {

void encode_columns(LeanWeight& lean, const at::Tensor& upper, Compensate compensate) {
  const int64_t cols = lean.cols();
  const at::Device device = lean.target.device();
  const auto levels = static_cast<int>(lean.level_values.size());
  const GroupCodebooks codebooks(lean.nm, levels, cols);
  const std::map<int, TensorCodebook> on_device = codebooks_on_device(lean, codebooks);
  const float mean_level =
      std::accumulate(lean.level_values.begin(), lean.level_values.end(), 0.f) / static_cast<float>(levels);
  const at::Tensor work = lean.target.clone();

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const auto [start, width, rest] = block;
    const std::vector<ColumnGroup> groups =
        groups_by_factor(lean, codebooks, block,
                         compensate == Compensate::kNone ? at::Tensor() : block.host_part(upper), compensate);
    const std::vector<at::Tensor> half_energies = send_half_energies(groups, device),
                                  metrics = send_matrices(groups, device, &ColumnGroup::metric_f),
                                  transposed = send_matrices(groups, device, &ColumnGroup::transposed);
    const at::Tensor weights = work.narrow(0, start, width);
    const auto of_group = [&](size_t g) { return weights.narrow(0, groups[g].first, groups[g].width); };

    // The block's scale on its current weights: codes and scale in turn, without feedback, from the mean kept
    // magnitude.
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
        const at::Tensor values =
            on_device.at(groups[g].width).best(half_energies[g], target, scale).units * scale;
        top = top + (values * target).sum(0);
        bottom = bottom + (values * metrics[g].mm(values)).sum(0);
      }
      scale = at::where(bottom.gt(0).logical_and(top.gt(0)),
                        (scale * (top / bottom)).clamp_min(kSmallestScale), scale);
    }
    const at::Tensor wanted = scale.cpu().contiguous();
    for (int64_t row = 0; row < lean.rows(); ++row)
      lean.set_scale(b, row, wanted.const_data_ptr<float>()[row]);
    scale = lean.scales[b].to(device);

    at::Tensor errors = at::zeros({width, lean.rows()}, weights.options());
    for (size_t g = 0; g < groups.size(); ++g) {
      const ColumnGroup& group = groups[g];
      const Found found = on_device.at(group.width).best(half_energies[g], metrics[g].mm(of_group(g)), scale);
      const at::Tensor error = transposed[g].mm(of_group(g) - found.units * scale);
      lean.symbols.narrow(0, start + group.first, group.width).copy_(found.symbols);
      errors.narrow(0, group.first, group.width).copy_(error);
      const int64_t next = group.first + group.width;
      if (compensate == Compensate::kColumn && next < width)
        weights.narrow(0, next, width - next)
            .addmm_(
                upper.narrow(0, start + group.first, group.width).narrow(1, start + next, width - next).t(),
                error, 1, -1);
    }
    if (compensate == Compensate::kNone || rest == 0) continue;
    const StageTimer timer("products", 2.0 * static_cast<double>(rest * width * lean.rows()));
    work.narrow(0, start + width, rest)
        .addmm_(upper.narrow(0, start, width).narrow(1, start + width, rest).t(), errors, 1, -1);
  }
}

double descend(LeanWeight& lean) {
  const int64_t cols = lean.cols();
  const at::Device device = lean.target.device();
  const GroupCodebooks codebooks(lean.nm, static_cast<int>(lean.level_values.size()), cols);
  const std::map<int, TensorCodebook> on_device = codebooks_on_device(lean, codebooks);
  const at::Tensor dense = lean.dense();
  const at::Tensor gradient = [&] {
    const StageTimer timer("products", 2.0 * static_cast<double>(cols * cols * lean.rows()));
    return lean.hessian.mm(dense - lean.target);
  }();
  at::Tensor changed = at::zeros({}, at::TensorOptions().dtype(at::kLong).device(device));

  for (int64_t b = 0; b < lean.column_blocks(); ++b) {
    const BlockColumns block(lean, b);
    const auto [start, width, rest] = block;
    const std::vector<ColumnGroup> groups =
        groups_by_hessian(lean, codebooks, block, block.host_part(lean.hessian));
    const std::vector<at::Tensor> half_energies = send_half_energies(groups, device);
    const at::Tensor scale = lean.scales[b].to(device);
    const at::Tensor change = at::zeros({width, lean.rows()}, dense.options());
    for (size_t g = 0; g < groups.size(); ++g) {
      const int64_t first = start + groups[g].first, own = groups[g].width,
                    later = start + width - first - own;
      const at::Tensor from_group = lean.hessian.narrow(0, first, own), q = dense.narrow(0, first, own);
      const at::Tensor target = from_group.narrow(1, first, own).mm(q) - gradient.narrow(0, first, own);
      const Found found = on_device.at(groups[g].width).best(half_energies[g], target, scale);
      const at::Tensor old = lean.symbols.narrow(0, first, own), delta = found.units * scale - q;
      changed += found.symbols.ne(old).sum();
      old.copy_(found.symbols);
      change.narrow(0, groups[g].first, own).copy_(delta);
      if (later > 0)
        gradient.narrow(0, first + own, later).addmm_(from_group.narrow(1, first + own, later).t(), delta);
    }
    if (rest == 0) continue;
    const StageTimer timer("products", 2.0 * static_cast<double>(rest * width * lean.rows()));
    gradient.narrow(0, start + width, rest)
        .addmm_(lean.hessian.narrow(0, start + width, rest).narrow(1, start, width), change);
  }
  return changed.item<double>() / static_cast<double>(lean.rows() * cols);
}

}  // namespace by_tensors

}  // namespace stbllm
