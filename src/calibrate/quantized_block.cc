#include "stbllm/calibrate/quantized_block.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "stbllm/base/profile.h"

namespace stbllm {
namespace {

void broadcast(BinarizedWeight& weight, LinearResult& result, const ProcessGroup& group, int root) {
  nlohmann::json facts;
  if (group.rank() == root)
    facts = {{"result", to_json(result, /*with_seconds=*/true)},
             {"column_block", weight.column_block},
             {"scale_bits", weight.scale_bits}};
  group.broadcast(facts, root);
  result = linear_result_from_json(facts.at("result"));
  weight.nm = result.scheme.nm;
  weight.levels = result.scheme.levels;
  weight.column_block = facts.at("column_block");
  weight.scale_bits = facts.at("scale_bits");
  for (at::Tensor BinarizedWeight::*tensor :
       {&BinarizedWeight::symbols, &BinarizedWeight::scales, &BinarizedWeight::scale_codes,
        &BinarizedWeight::row_scales, &BinarizedWeight::level_values, &BinarizedWeight::salient_columns,
        &BinarizedWeight::salient_signs, &BinarizedWeight::outlier_columns, &BinarizedWeight::outlier_values,
        &BinarizedWeight::unpackable})
    group.broadcast(weight.*tensor, root);
}

}  // namespace

std::vector<int> divide(const std::vector<LinearSpec>& linears, int processes) {
  std::vector<size_t> order(linears.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return linears[a].rows * linears[a].cols > linears[b].rows * linears[b].cols;
  });
  std::vector<int> owners(linears.size());
  std::vector<int64_t> load(processes);
  for (const size_t i : order) {
    const auto idlest = std::min_element(load.begin(), load.end());
    *idlest += linears[i].rows * linears[i].cols;
    owners[i] = static_cast<int>(idlest - load.begin());
  }
  return owners;
}

void exchange(std::map<std::string, BinarizedWeight>& weights, std::vector<LinearResult>& results,
              const std::vector<LinearSpec>& linears, const std::vector<int>& owners,
              const ProcessGroup& group) {
  if (group.size() == 1) return;
  const StageTimer timer("exchange");
  results.resize(linears.size());
  for (size_t i = 0; i < linears.size(); ++i)
    broadcast(weights[linears[i].name], results[i], group, owners[i]);
}

void install(const BinarizedWeight& weight, DecoderBlock& block, Role role) {
  const DenseLinear& dense = block.dense(role);
  block.set_linear(role, std::make_unique<DenseLinear>(weight.to_dense().to(dense.weight().device()),
                                                       dense.bias(), dense.product_dtype()));
}

void install(const QuantizedBlock& quantized, DecoderBlock& block, const ModelSpec& spec) {
  for (const LinearSpec& linear : block.linears()) {
    const auto& dense = block.dense(linear.role);
    const auto weight = quantized.linears.find(linear.name);
    const auto bias = quantized.tensors.find(linear.name + ".bias");
    block.set_linear(
        linear.role,
        std::make_unique<DenseLinear>(
            weight == quantized.linears.end() ? dense.weight()
                                              : weight->second.to_dense().to(dense.weight().device()),
            bias == quantized.tensors.end() ? dense.bias() : bias->second.to(dense.weight().device()),
            dense.product_dtype()));
  }
  for (const NormSpec& norm : spec.norms(block.index()))
    install(quantized.tensors, block.norm(norm.role), norm.name);
}

void install(const std::map<std::string, at::Tensor>& tensors, NormWeights& norm, const std::string& name) {
  if (const auto weight = tensors.find(name + ".weight"); weight != tensors.end())
    norm.weight = weight->second.to(norm.weight.device());
  if (const auto bias = tensors.find(name + ".bias"); bias != tensors.end())
    norm.bias = bias->second.to(norm.bias.device());
}

}  // namespace stbllm
