#include "stbllm/train/trained_block.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "stbllm/train/adam.h"

namespace stbllm {
namespace {

/// Of biases that are zero or nearly so.
constexpr double kSmallestUnit = 1e-3;

}  // namespace

void TrainedVectors::add(at::Tensor& tensor, const std::string& name, bool by_factors) {
  if (!tensor.defined()) return;
  Vector vector{name, {}, tensor.to(at::kFloat).clone(), {}, {}, {}, {}};
  if (!by_factors) vector.unit = vector.original.square().mean().sqrt().clamp_min(kSmallestUnit);
  vector.leaf = vector.original.clone().set_requires_grad(true);
  vector.moved = at::zeros_like(vector.original);
  vector.mean = at::zeros_like(vector.original);
  vector.square = at::zeros_like(vector.original);
  tensor = vector.leaf;
  vectors_.push_back(std::move(vector));
}

void TrainedVectors::add_norm(NormWeights& norm, const std::string& name) {
  add(norm.weight, name + ".weight", /*by_factors=*/true);
  add(norm.bias, name + ".bias", /*by_factors=*/false);
}

void TrainedVectors::add_bias(at::Tensor& bias, const std::string& name) {
  add(bias, name, /*by_factors=*/false);
}

void TrainedVectors::step(double rate) {
  const at::NoGradGuard no_grad;
  const AdamStep adam(rate, ++steps_);
  for (Vector& v : vectors_) {
    const bool by_factors = !v.unit.defined();
    v.moved.add_(adam(v.leaf.grad() * (by_factors ? v.leaf.detach() : v.unit), v.mean, v.square));
    update_leaf(v);
    v.leaf.mutable_grad().reset();
  }
}

void TrainedVectors::update_leaf(Vector& v) {
  v.leaf.detach().copy_(v.unit.defined() ? v.original + v.unit * v.moved : v.original * v.moved.exp());
}

void TrainedVectors::visit_state(const StateVisitor& visit) {
  for (Vector& v : vectors_) {
    visit(v.name + ".moved", v.moved);
    visit(v.name + ".mean", v.mean);
    visit(v.name + ".square", v.square);
  }
}

void TrainedVectors::resume(int64_t steps) {
  const at::NoGradGuard no_grad;
  steps_ = steps;
  for (Vector& v : vectors_) update_leaf(v);
}

void TrainedVectors::write_back(std::map<std::string, at::Tensor>& tensors) const {
  for (const Vector& v : vectors_)
    tensors[v.name] = v.leaf.detach().to(at::kCPU, /*non_blocking=*/false, /*copy=*/true);
}

TrainedBlock::TrainedBlock(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized,
                           bool train_codes)
    : quantized_(quantized) {
  const std::vector<LinearSpec> linears = block.linears();
  std::vector<at::Tensor> originals;
  for (const LinearSpec& linear : linears) originals.push_back(block.dense(linear.role).weight());
  install(quantized, block, spec);
  weights_.reserve(linears.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    at::Tensor bias = block.dense(linears[i].role).bias();
    vectors_.add_bias(bias, linears[i].name + ".bias");
    const auto found = quantized.linears.find(linears[i].name);
    if (found == quantized.linears.end()) {  // it keeps its weights
      const DenseLinear& dense = block.dense(linears[i].role);
      block.set_linear(linears[i].role,
                       std::make_unique<DenseLinear>(dense.weight(), bias, dense.product_dtype()));
      continue;
    }
    names_.push_back(linears[i].name);
    weights_.emplace_back(found->second, originals[i], train_codes);
    block.set_linear(linears[i].role, std::make_unique<DenseLinear>(weights_.back().dense(), bias));
  }
  for (const NormSpec& norm : spec.norms(block.index())) vectors_.add_norm(block.norm(norm.role), norm.name);
}

void TrainedBlock::step(const TuneRates& rates) {
  for (LatentWeight& weight : weights_) weight.step(rates);
  vectors_.step(rates.gains);
}

void TrainedBlock::visit_state(const StateVisitor& visit) {
  for (size_t i = 0; i < weights_.size(); ++i) weights_[i].visit_state(names_[i], visit);
  vectors_.visit_state(visit);
}

void TrainedBlock::resume(int64_t steps) {
  for (LatentWeight& weight : weights_) weight.resume(steps);
  vectors_.resume(steps);
}

double TrainedBlock::write_back() {
  int64_t changed = 0, total = 0;
  for (LatentWeight& weight : weights_) {
    changed += weight.write_back();
    total += weight.dense().numel();
  }
  vectors_.write_back(quantized_.tensors);
  return static_cast<double>(changed) / static_cast<double>(total);
}

}  // namespace stbllm
