#include "stbllm/pipeline/trained_block.h"

#include <torch/torch.h>

namespace stbllm {
void TrainedVectors::add(at::Tensor& tensor, const std::string& name) {
  if (!tensor.defined()) return;
  tensor = tensor.to(at::kFloat).clone().set_requires_grad(true);
  named_.emplace_back(name, tensor);
}

void TrainedVectors::add(NormWeights& norm, const std::string& name) {
  add(norm.weight, name + ".weight");
  add(norm.bias, name + ".bias");
}

void TrainedVectors::step(double rate) {
  if (named_.empty()) return;
  if (adam_ == nullptr) {
    std::vector<at::Tensor> tensors;
    for (const auto& [name, tensor] : named_) tensors.push_back(tensor);
    adam_ = std::make_shared<torch::optim::Adam>(tensors, torch::optim::AdamOptions(rate).betas({0.9, 0.95}));
  }
  static_cast<torch::optim::AdamOptions&>(adam_->param_groups()[0].options()).lr(rate);
  adam_->step();
  adam_->zero_grad();
}

void TrainedVectors::write_back(std::map<std::string, at::Tensor>& tensors) const {
  for (const auto& [name, tensor] : named_) tensors[name] = tensor.detach().clone();
}

TrainedBlock::TrainedBlock(DecoderBlock& block, const ModelSpec& spec, QuantizedBlock& quantized, bool train_codes)
    : quantized_(quantized) {
  const std::vector<LinearSpec> linears = block.linears();
  std::vector<at::Tensor> originals;
  for (const LinearSpec& linear : linears) originals.push_back(dynamic_cast<const DenseLinear&>(block.linear(linear.role)).weight());
  install(quantized, block, spec);
  weights_.reserve(linears.size());
  for (size_t i = 0; i < linears.size(); ++i) {
    at::Tensor bias = dynamic_cast<const DenseLinear&>(block.linear(linears[i].role)).bias();
    vectors_.add(bias, linears[i].name + ".bias");
    weights_.emplace_back(quantized.linears.at(linears[i].name), originals[i], train_codes);
    block.set_linear(linears[i].role, std::make_unique<DenseLinear>(weights_.back().dense(), bias));
  }
  vectors_.add(block.attn_norm(), spec.attn_norm(block.index()));
  vectors_.add(block.mlp_norm(), spec.mlp_norm(block.index()));
}

void TrainedBlock::step(const TuneRates& rates) {
  for (LatentWeight& weight : weights_) weight.step(rates);
  vectors_.step(rates.gains);
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
