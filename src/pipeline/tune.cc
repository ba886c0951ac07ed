#include "stbllm/pipeline/tune.h"

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

/// Symbols (rows, cols) of latent values: the N largest magnitudes of each group, their signs, their nearest levels.
at::Tensor project(const at::Tensor& latent, NmPattern nm, const std::vector<float>& levels) {
  const int64_t rows = latent.size(0), cols = latent.size(1);
  std::vector<float> border;
  for (size_t l = 0; l + 1 < levels.size(); ++l) border.push_back((levels[l] + levels[l + 1]) / 2);
  at::Tensor symbols = at::zeros({rows, cols}, at::kChar);
  const float* values = latent.data_ptr<float>();
  int8_t* out = symbols.data_ptr<int8_t>();
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t first = 0; first < cols; first += nm.group) {
        const int width = static_cast<int>(std::min<int64_t>(nm.group, cols - first));
        const float* group = values + row * cols + first;
        std::array<bool, 16> taken{};
        for (int k = 0; k < std::min(nm.keep, width); ++k) {
          int best = -1;
          for (int c = 0; c < width; ++c)
            if (!taken[c] && (best < 0 || std::fabs(group[c]) > std::fabs(group[best]))) best = c;
          taken[best] = true;
          int level = 0;
          for (const float b : border) level += std::fabs(group[best]) > b;
          out[row * cols + first + best] = static_cast<int8_t>(group[best] < 0 ? -1 - level : 1 + level);
        }
      }
  });
  return symbols;
}

/// One linear while it is tuned.
struct TunedWeight {
  BinarizedWeight* weight;
  at::Tensor unit_scales;  // (rows, cols): scale per weight before row_gain, level 1
  at::Tensor latent;       // (rows, cols), in units of the scale; requires grad
  at::Tensor row_gain;     // (rows, 1): log of the factor on the row's scales; requires grad
  at::Tensor level_gain;   // (levels): log of the factor on each level; requires grad where there are several
  std::vector<float> levels;
  at::Tensor outlier_mask, outlier_dense;  // (cols), (rows, cols); undefined without outlier columns

  /// The weights of the forward pass, differentiable in latent, row_gain and level_gain.
  at::Tensor effective(bool codes) const {
    std::vector<float> now = levels;
    for (size_t l = 0; l < now.size(); ++l) now[l] *= std::exp(level_gain.data_ptr<float>()[l]);
    at::Tensor symbols;
    {
      const at::NoGradGuard no_grad;
      symbols = codes ? project(latent.detach(), weight->nm, now) : weight->symbols;
    }
    at::Tensor unit;
    if (levels.size() == 1) {
      unit = symbols.to(at::kFloat) * level_gain.exp();
    } else {
      unit = at::zeros_like(latent);
      for (size_t l = 0; l < levels.size(); ++l) {
        const auto index = static_cast<int64_t>(l);
        const at::Tensor part = symbols.eq(1 + index).to(at::kFloat) - symbols.eq(-1 - index).to(at::kFloat);
        unit = unit + part * (level_gain[index].exp() * levels[l]);
      }
    }
    if (codes) unit = unit + (latent - latent.detach());  // straight through
    at::Tensor dense = unit * (unit_scales * row_gain.exp());
    if (outlier_mask.defined()) dense = at::where(outlier_mask, outlier_dense, dense);
    return dense;
  }

  void finish(bool codes) const {
    const at::NoGradGuard no_grad;
    const at::Tensor gain = row_gain.exp();
    std::vector<float> now = levels;
    for (size_t l = 0; l < now.size(); ++l) now[l] *= std::exp(level_gain.data_ptr<float>()[l]);
    if (codes) {
      weight->symbols = project(latent, weight->nm, now);
      if (weight->has_outliers()) {
        const at::Tensor columns = weight->outlier_columns.to(at::kLong);
        weight->symbols.index_copy_(1, columns, weight->symbols.index_select(1, columns).ne(0).to(at::kChar));
      }
    }
    const auto half = [](const at::Tensor& x) { return x.clamp(1e-6, 6e4).to(at::kHalf).to(at::kFloat); };
    if (weight->scale_bits < 16) {
      weight->row_scales = half(weight->row_scales * gain.squeeze(1));
      weight->level_values = half(at::tensor(now, at::kFloat));
      weight->expand_scales();
    } else {
      weight->scales = half(weight->scales * gain.unsqueeze(2) * level_gain.exp());
    }
  }
};

TunedWeight start_tuning(BinarizedWeight& weight, const at::Tensor& original) {
  TunedWeight tuned;
  tuned.weight = &weight;
  const int64_t cols = weight.cols();
  at::Tensor per_block;  // (rows, blocks), level 1
  if (weight.scale_bits < 16) {
    const at::Tensor values = weight.level_values.contiguous();
    tuned.levels.assign(values.data_ptr<float>(), values.data_ptr<float>() + values.numel());
    per_block = weight.scales.select(2, 0) / tuned.levels[0];
  } else {
    tuned.levels = {1.f};
    per_block = weight.scales.select(2, 0);
  }
  const at::Tensor block = at::arange(cols, at::kLong).div(weight.column_block, "floor");
  tuned.unit_scales = per_block.index_select(1, block);
  // Kept weights start at their level, pruned ones at the original weight, but not so far out that they would be kept.
  const at::Tensor value = at::where(weight.symbols.ne(0), weight.to_dense() / tuned.unit_scales, at::zeros_like(tuned.unit_scales));
  const float limit = 0.5f * tuned.levels[0];
  const at::Tensor pruned = (original.to(at::kFloat) / tuned.unit_scales).clamp(-limit, limit);
  tuned.latent = at::where(weight.symbols.ne(0), value, pruned);
  if (weight.has_outliers()) {
    const at::Tensor columns = weight.outlier_columns.to(at::kLong);
    // Kept or not, the symbols at outlier columns do not count; their latents keep the support as it is.
    tuned.latent.index_copy_(1, columns, weight.symbols.index_select(1, columns).to(at::kFloat) * tuned.levels[0]);
    tuned.outlier_mask = at::zeros({cols}, at::kBool).index_fill_(0, columns, true);
    tuned.outlier_dense = at::zeros_like(tuned.latent).index_copy_(1, columns, weight.outlier_values.t().contiguous());
  }
  tuned.latent = tuned.latent.contiguous().set_requires_grad(true);
  tuned.row_gain = at::zeros({weight.rows(), 1}, at::kFloat).set_requires_grad(true);
  tuned.level_gain = at::zeros({static_cast<int64_t>(tuned.levels.size())}, at::kFloat).set_requires_grad(tuned.levels.size() > 1);
  return tuned;
}

/// bfloat16 product, float32 in and out: residual stream and norms keep their precision.
class TunedLinear : public Linear {
 public:
  TunedLinear(at::Tensor weight, at::Tensor bias) : weight_(weight.to(at::kBFloat16)), bias_(std::move(bias)) {}
  at::Tensor forward(const at::Tensor& x) const override {
    const at::Tensor y = at::linear(x.to(at::kBFloat16), weight_).to(at::kFloat);
    return bias_.defined() ? y + bias_ : y;
  }
  int64_t bytes() const override { return static_cast<int64_t>(weight_.nbytes()); }

 private:
  at::Tensor weight_, bias_;
};

}  // namespace

TuneReport tune_block(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized, const at::Tensor& inputs,
                      const at::Tensor& targets, int64_t holdout, const Recipe& recipe) {
  const int64_t windows = inputs.size(0), seqlen = inputs.size(1), training = windows - holdout;
  const bool codes = recipe.tune_code_lr > 0;
  std::vector<TunedWeight> weights;
  std::map<std::string, at::Tensor> vectors;  // norms and biases, as (1 + gain) * original or original + shift
  std::vector<at::Tensor> code_parameters, scale_parameters;
  const std::vector<LinearSpec> linears = block.linears();
  std::vector<at::Tensor> biases;
  for (const LinearSpec& linear : linears) {
    const auto& dense = dynamic_cast<const DenseLinear&>(block.linear(linear.role));
    weights.push_back(start_tuning(quantized.linears.at(linear.name), dense.weight()));
    if (codes) code_parameters.push_back(weights.back().latent);
    scale_parameters.push_back(weights.back().row_gain);
    if (weights.back().levels.size() > 1) scale_parameters.push_back(weights.back().level_gain);
    at::Tensor bias = dense.bias();
    if (bias.defined()) {
      bias = bias.to(at::kFloat).clone().set_requires_grad(true);
      scale_parameters.push_back(bias);
      vectors[linear.name + ".bias"] = bias;
    }
    biases.push_back(bias);
  }
  const auto tune_norm = [&](NormWeights& norm, const std::string& name) {
    for (auto& [tensor, suffix] : {std::pair<at::Tensor*, const char*>{&norm.weight, ".weight"}, {&norm.bias, ".bias"}}) {
      if (!tensor->defined()) continue;
      *tensor = tensor->to(at::kFloat).clone().set_requires_grad(true);
      scale_parameters.push_back(*tensor);
      vectors[name + suffix] = *tensor;
    }
  };
  tune_norm(block.attn_norm(), spec.attn_norm(block.index()));
  tune_norm(block.mlp_norm(), spec.mlp_norm(block.index()));

  const auto install_tuned = [&] {
    for (size_t i = 0; i < linears.size(); ++i)
      block.set_linear(linears[i].role, std::make_unique<TunedLinear>(weights[i].effective(codes), biases[i]));
  };
  const Positions positions(spec, 0, seqlen, at::kFloat, at::kCPU);
  at::Tensor token_weight, energy;
  {
    const at::NoGradGuard no_grad;
    const at::Tensor norm = targets.norm(2, -1).clamp_min(1e-12);
    token_weight = (3 * norm.median() / norm).clamp_max(1.0).square();
    energy = ((targets - inputs).square().sum(-1) * token_weight).mean().clamp_min(1e-20);
  }
  const auto loss_of = [&](int64_t first, int64_t count) {
    const at::Tensor out = block.forward(inputs.narrow(0, first, count), positions);
    return ((out - targets.narrow(0, first, count)).square().sum(-1) * token_weight.narrow(0, first, count)).mean() / energy;
  };
  const int64_t step = std::max<int64_t>(1, 2048 / seqlen);
  const auto judge = [&] {
    const at::NoGradGuard no_grad;
    install_tuned();
    const int64_t from = holdout > 0 ? training : 0;
    double sum = 0;
    for (int64_t first = from; first < windows; first += step) {
      const int64_t count = std::min(step, windows - first);
      sum += loss_of(first, count).item<double>() * static_cast<double>(count);
    }
    return sum / static_cast<double>(windows - from);
  };

  std::vector<torch::optim::OptimizerParamGroup> groups;
  groups.emplace_back(scale_parameters, std::make_unique<torch::optim::AdamOptions>(torch::optim::AdamOptions(recipe.tune_lr).betas({0.9, 0.95})));
  if (codes)
    groups.emplace_back(code_parameters, std::make_unique<torch::optim::AdamOptions>(torch::optim::AdamOptions(recipe.tune_code_lr).betas({0.9, 0.95})));
  torch::optim::Adam adam(std::move(groups));
  std::vector<at::Tensor> parameters = scale_parameters;
  parameters.insert(parameters.end(), code_parameters.begin(), code_parameters.end());
  const auto snapshot = [&] {
    std::vector<at::Tensor> copy;
    for (const at::Tensor& p : parameters) copy.push_back(p.detach().clone());
    return copy;
  };

  std::vector<at::Tensor> symbols_before;
  for (const TunedWeight& weight : weights) symbols_before.push_back(weight.weight->symbols);
  TuneReport report;
  report.loss_before = report.loss_after = judge();
  std::vector<at::Tensor> best = snapshot();
  const int64_t steps_per_epoch = (training + step - 1) / step, total_steps = steps_per_epoch * recipe.tune_epochs;
  int64_t done = 0;
  for (int epoch = 1; epoch <= recipe.tune_epochs; ++epoch) {
    for (int64_t first = 0; first < training; first += step, ++done) {
      const double decay = 0.5 * (1 + std::cos(M_PI * static_cast<double>(done) / static_cast<double>(total_steps)));
      const double warmup = std::min(1.0, static_cast<double>(done + 1) / 8);  // Adam's first steps have no variance to go by
      static_cast<torch::optim::AdamOptions&>(adam.param_groups()[0].options()).lr(recipe.tune_lr * decay * warmup);
      if (codes) static_cast<torch::optim::AdamOptions&>(adam.param_groups()[1].options()).lr(recipe.tune_code_lr * decay * warmup);
      const at::AutoGradMode with_grad(true);
      install_tuned();
      adam.zero_grad();
      loss_of(first, std::min(step, training - first)).backward();
      adam.step();
    }
    const double loss = judge();
    if (loss < report.loss_after) {
      report.loss_after = loss;
      report.epochs = epoch;
      best = snapshot();
    }
  }
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters.size(); ++i) parameters[i].detach().copy_(best[i]);
  int64_t changed = 0, total = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (report.epochs > 0) weights[i].finish(codes);
    changed += weights[i].weight->symbols.ne(symbols_before[i]).sum().item<int64_t>();
    total += symbols_before[i].numel();
    block.set_linear(linears[i].role, std::make_unique<DenseLinear>(weights[i].weight->to_dense(), biases[i].defined() ? biases[i].detach() : biases[i]));
  }
  for (auto& [name, tensor] : vectors) quantized.tensors[name] = tensor.detach();
  install(quantized, block, spec);
  report.changed = static_cast<double>(changed) / static_cast<double>(total);
  return report;
}

}  // namespace stbllm
