#include "decode_step.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "fused_rows.h"
#include "single_query.h"
#include "stbllm/base/error.h"
#include "stbllm/base/parallel.h"
#include "stbllm/model/linear.h"

namespace stbllm {
namespace {

uint16_t* elements(const at::Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }
const uint16_t* elements_or_null(const at::Tensor& x) { return x.defined() ? elements(x) : nullptr; }

bool is_plain(const at::Tensor& weight) {
  return !weight.defined() || (weight.scalar_type() == at::kBFloat16 && weight.is_contiguous());
}

/// Adds a bias to elements begin .. end - 1, where there is one.
void add_bias(const uint16_t* bias, uint16_t* y, int64_t begin, int64_t end) {
  if (bias != nullptr) add_elements(bias, y, begin, end);
}

}  // namespace

DecodeStep::DecodeStep(const ModelSpec& spec) : spec_(spec) {
  const auto make = [](int64_t width) { return at::zeros({1, width}, at::kBFloat16); };
  hidden_ = make(spec.hidden), input_ = make(spec.hidden), branch_ = make(spec.hidden);
  queries_ = make(spec.heads * spec.head_dim), mixed_ = make(spec.heads * spec.head_dim);
  keys_ = make(spec.kv_heads * spec.head_dim), values_ = make(spec.kv_heads * spec.head_dim);
  gate_ = make(spec.ffn), up_ = make(spec.ffn), middle_ = make(spec.ffn);
}

std::unique_ptr<DecodeStep> DecodeStep::make(const ModelSpec& spec,
                                             std::span<const std::shared_ptr<DecoderBlock>> blocks,
                                             const Backend& backend, at::ScalarType dtype) {
  const bool gated = spec.architecture->mlp == Mlp::kGated;
  if (dtype != at::kBFloat16 || backend.device() != "cpu" || !spec.norm_first ||
      spec.activation != (gated ? Activation::kSilu : Activation::kRelu))
    return nullptr;
  std::unique_ptr<DecodeStep> step(new DecodeStep(spec));
  return step->plan(blocks, backend) ? std::move(step) : nullptr;
}

bool DecodeStep::plan(std::span<const std::shared_ptr<DecoderBlock>> blocks, const Backend& backend) {
  std::vector<ProductSet> sets;
  for (const std::shared_ptr<DecoderBlock>& block : blocks) {
    Block weights{};
    for (const NormSpec& norm : block->norms()) {
      const auto& [weight, bias] = block->norm(norm.role);
      if (!is_plain(weight) || !is_plain(bias)) return false;
      weights.norm[static_cast<size_t>(norm.role)] = {true, elements_or_null(weight), elements_or_null(bias)};
    }
    const auto add_set = [&](const at::Tensor& x, std::initializer_list<std::pair<Role, at::Tensor>> rows) {
      ProductSet set{.products = {}, .x = view_of(x)};
      for (const auto& [role, y] : rows) {
        const auto* packed = dynamic_cast<const PackedLinear*>(&block->linear(role));
        if (packed == nullptr || !is_plain(packed->bias())) return false;
        weights.bias[static_cast<size_t>(role)] = elements_or_null(packed->bias());
        set.products.push_back({&packed->matrix(), view_of(y)});
      }
      sets.push_back(std::move(set));
      return true;
    };
    const bool gated = spec_.architecture->mlp == Mlp::kGated;
    if (!add_set(input_, {{Role::kQ, queries_}, {Role::kK, keys_}, {Role::kV, values_}}) ||
        !add_set(mixed_, {{Role::kO, branch_}}) ||
        !(gated ? add_set(input_, {{Role::kGate, gate_}, {Role::kUp, up_}})
                : add_set(input_, {{Role::kUp, middle_}})) ||
        !add_set(middle_, {{Role::kDown, branch_}}))
      return false;
    blocks_.push_back(weights);
  }
  products_ = backend.plan(std::move(sets));
  return products_ != nullptr;
}

at::Tensor DecodeStep::run(const at::Tensor& hidden, const Positions& positions, KeyValueCache& cache) {
  STBLLM_CHECK(
      hidden.numel() == spec_.hidden && hidden.scalar_type() == at::kBFloat16 && positions.count == 1,
      "a step of {} elements at {} positions", hidden.numel(), positions.count);
  STBLLM_CHECK(cache.length() == positions.first, "the cache holds {} tokens, the step stands at {}",
               cache.length(), positions.first);
  cache.check_room(1);
  hidden_.copy_(hidden.view({1, spec_.hidden}));
  const SingleQuery query{.heads = spec_.heads,
                          .kv_heads = spec_.kv_heads,
                          .dim = spec_.head_dim,
                          .position = positions.first,
                          .window = spec_.sliding_window};
  if (const int64_t floats = single_query_floats(query); !parts_.defined() || parts_.numel() < floats)
    parts_ = at::empty({2 * floats}, at::kFloat);
#pragma omp parallel num_threads(team_size(2))
  if (const TeamPlace team = TeamPlace::among(runnable_threads(), barrier_); !team.is_outside())
    for (int64_t index = 0; index < static_cast<int64_t>(blocks_.size()); ++index)
      pass_block(index, positions, cache, team);
  return hidden_.clone().view({1, 1, spec_.hidden});
}

void DecodeStep::pass_block(int64_t index, const Positions& positions, KeyValueCache& cache,
                            const TeamPlace& team) const {
  const Block& block = blocks_[static_cast<size_t>(index)];
  const auto multiply = [&](Tap tap) {
    products_->run(static_cast<size_t>(index * kTapCount + static_cast<int>(tap)), team);
    team.wait_for_all();
  };
  const auto norm = [&](NormRole role) { return block.norm[static_cast<size_t>(role)]; };
  const auto bias = [&](Role role) { return block.bias[static_cast<size_t>(role)]; };

  enter_branch(team, norm(NormRole::kAttn));
  multiply(Tap::kAttnIn);
  append_heads(index, positions, cache, team);
  team.wait_for_all();
  attend_single_query({.queries = elements(queries_),
                       .keys = elements(cache.keys(index)),
                       .values = elements(cache.values(index)),
                       .out = elements(mixed_),
                       .heads = spec_.heads,
                       .kv_heads = spec_.kv_heads,
                       .dim = spec_.head_dim,
                       .head_stride = cache.capacity() * spec_.head_dim,
                       .position = positions.first,
                       .window = spec_.sliding_window},
                      parts_.data_ptr<float>(), team);
  team.wait_for_all();
  multiply(Tap::kAttnOut);
  leave_branch(team, bias(Role::kO));

  enter_branch(team, norm(NormRole::kMlp));
  multiply(Tap::kMlpIn);
  pass_activation(block, team);
  team.wait_for_all();
  multiply(Tap::kMlpMid);
  leave_branch(team, bias(Role::kDown));
}

void DecodeStep::normalize(const Norm& norm, const uint16_t* x, uint16_t* y, int64_t width,
                           int64_t row) const {
  const NormRows<uint16_t> rows{.x = x,
                                .weight = norm.weight,
                                .bias = norm.bias,
                                .y = y,
                                .width = width,
                                .eps = static_cast<float>(spec_.norm_eps)};
  if (spec_.architecture->norm == stbllm::Norm::kRms)
    rms_norm_rows(rows, row, row + 1);
  else
    layer_norm_rows(rows, row, row + 1);
}

void DecodeStep::enter_branch(const TeamPlace& team, const Norm& norm) const {
  if (team.thread == 0)  // who has just written the hidden states
    normalize(norm, elements(hidden_), elements(input_), spec_.hidden, 0);
  team.wait_for_all();
}

void DecodeStep::leave_branch(const TeamPlace& team, const uint16_t* bias) const {
  if (team.thread != 0) return;
  add_bias(bias, elements(branch_), 0, spec_.hidden);
  add_elements(elements(branch_), elements(hidden_), 0, spec_.hidden);
}

void DecodeStep::pass_activation(const Block& block, const TeamPlace& team) const {
  const int64_t begin = team.begin(spec_.ffn), end = team.end(spec_.ffn);
  const uint16_t* const up_bias = block.bias[static_cast<size_t>(Role::kUp)];
  if (spec_.architecture->mlp == Mlp::kPlain) {
    add_bias(up_bias, elements(middle_), begin, end);
    rectify(elements(middle_), begin, end);
    return;
  }
  add_bias(block.bias[static_cast<size_t>(Role::kGate)], elements(gate_), begin, end);
  add_bias(up_bias, elements(up_), begin, end);
  multiply_gates(Gates<uint16_t>{.gate = elements(gate_), .up = elements(up_), .y = elements(middle_)}, begin,
                 end);
}

void DecodeStep::append_heads(int64_t index, const Positions& positions, KeyValueCache& cache,
                              const TeamPlace& team) const {
  const Block& block = blocks_[static_cast<size_t>(index)];
  const int64_t dim = spec_.head_dim, heads = spec_.heads, kv_heads = spec_.kv_heads;
  const auto bias = [&](Role role, const at::Tensor& of_all, int64_t head) {
    add_bias(block.bias[static_cast<size_t>(role)], elements(of_all), head * dim, (head + 1) * dim);
  };
  const auto turn = [&](NormRole role, const at::Tensor& of_all, int64_t head) {
    uint16_t* const x = elements(of_all);
    if (const Norm& norm = block.norm[static_cast<size_t>(role)]; norm.exists)
      normalize(norm, x, x, dim, head);
    if (spec_.architecture->position != Position::kRotary) return;
    rotate_rows(RotateRows<uint16_t>{.x = x,
                                     .y = x,
                                     .cos = elements(positions.cos),
                                     .sin = elements(positions.sin),
                                     .heads = heads,
                                     .tokens = 1,
                                     .width = dim,
                                     .batch_stride = 0,
                                     .head_stride = dim,
                                     .token_stride = 0},
                head, head + 1);
  };
  const auto append = [&](const at::Tensor& of_all, const at::Tensor& cached, int64_t head) {
    std::copy_n(elements(of_all) + head * dim, dim,
                elements(cached) + (head * cache.capacity() + positions.first) * dim);
  };
  const int64_t all = heads + 2 * kv_heads;
  for (int64_t i = team.begin(all); i < team.end(all); ++i)
    if (i < heads) {
      bias(Role::kQ, queries_, i);
      turn(NormRole::kQuery, queries_, i);
    } else if (i < heads + kv_heads) {
      bias(Role::kK, keys_, i - heads);
      turn(NormRole::kKey, keys_, i - heads);
      append(keys_, cache.keys(index), i - heads);
    } else {
      bias(Role::kV, values_, i - heads - kv_heads);
      append(values_, cache.values(index), i - heads - kv_heads);
    }
}

}  // namespace stbllm
