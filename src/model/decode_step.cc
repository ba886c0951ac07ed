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

void wait_for_all() {
#pragma omp barrier
}

}  // namespace

/// A thread's place in the region.
struct DecodeStep::Share : ThreadPlace {
  Share() : ThreadPlace(ThreadPlace::among(omp_get_num_threads())) {}
  bool is_first() const { return thread == 0; }
};

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
  const Architecture& architecture = *spec.architecture;
  if (dtype != at::kBFloat16 || backend.device() != "cpu" || !spec.norm_first ||
      architecture.norm != Norm::kRms || architecture.position != Position::kRotary ||
      architecture.mlp != Mlp::kGated || spec.activation != Activation::kSilu)
    return nullptr;
  std::unique_ptr<DecodeStep> step(new DecodeStep(spec));
  return step->plan(blocks, backend) ? std::move(step) : nullptr;
}

bool DecodeStep::plan(std::span<const std::shared_ptr<DecoderBlock>> blocks, const Backend& backend) {
  std::vector<ProductSet> sets;
  for (const std::shared_ptr<DecoderBlock>& block : blocks) {
    Block weights{};
    for (const NormSpec& norm : block->norms()) {
      const at::Tensor& weight = block->norm(norm.role).weight;
      if (!is_plain(weight)) return false;
      const uint16_t** const places[kNormRoleCount] = {&weights.attn_norm, &weights.mlp_norm,
                                                       &weights.query_norm, &weights.key_norm};
      *places[static_cast<size_t>(norm.role)] = elements_or_null(weight);
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
    if (!add_set(input_, {{Role::kQ, queries_}, {Role::kK, keys_}, {Role::kV, values_}}) ||
        !add_set(mixed_, {{Role::kO, branch_}}) ||
        !add_set(input_, {{Role::kGate, gate_}, {Role::kUp, up_}}) ||
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
  {
    const Share share;
    for (int64_t index = 0; index < static_cast<int64_t>(blocks_.size()); ++index)
      pass_block(index, positions, cache, share);
  }
  return hidden_.clone().view({1, 1, spec_.hidden});
}

void DecodeStep::pass_block(int64_t index, const Positions& positions, KeyValueCache& cache,
                            const Share& share) const {
  const Block& block = blocks_[static_cast<size_t>(index)];
  const auto multiply = [&](Tap tap) {
    products_->run(static_cast<size_t>(index * kTapCount + static_cast<int>(tap)));
  };
  const auto bias = [&](Role role) { return block.bias[static_cast<size_t>(role)]; };

  enter_branch(share, block.attn_norm);
  multiply(Tap::kAttnIn);
  wait_for_all();
  append_heads(index, positions, cache, share);
  wait_for_all();
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
                      parts_.data_ptr<float>());
  wait_for_all();
  multiply(Tap::kAttnOut);
  wait_for_all();
  leave_branch(share, bias(Role::kO));

  enter_branch(share, block.mlp_norm);
  multiply(Tap::kMlpIn);
  wait_for_all();
  const int64_t begin = share.begin(spec_.ffn), end = share.end(spec_.ffn);
  add_bias(bias(Role::kGate), elements(gate_), begin, end);
  add_bias(bias(Role::kUp), elements(up_), begin, end);
  multiply_gates(Gates<uint16_t>{.gate = elements(gate_), .up = elements(up_), .y = elements(middle_)}, begin,
                 end);
  wait_for_all();
  multiply(Tap::kMlpMid);
  wait_for_all();
  leave_branch(share, bias(Role::kDown));
}

void DecodeStep::enter_branch(const Share& share, const uint16_t* norm) const {
  if (share.is_first())  // who has just written the hidden states
    norm_rows(NormRows<uint16_t>{.x = elements(hidden_),
                                 .weight = norm,
                                 .y = elements(input_),
                                 .width = spec_.hidden,
                                 .eps = static_cast<float>(spec_.norm_eps)},
              0, 1);
  wait_for_all();
}

void DecodeStep::leave_branch(const Share& share, const uint16_t* bias) const {
  if (!share.is_first()) return;
  add_bias(bias, elements(branch_), 0, spec_.hidden);
  add_elements(elements(branch_), elements(hidden_), 0, spec_.hidden);
}

void DecodeStep::append_heads(int64_t index, const Positions& positions, KeyValueCache& cache,
                              const Share& share) const {
  const Block& block = blocks_[static_cast<size_t>(index)];
  const int64_t dim = spec_.head_dim, heads = spec_.heads, kv_heads = spec_.kv_heads;
  const auto prepare = [&](Role role, const uint16_t* norm, const at::Tensor& of_all, int64_t head) {
    uint16_t* const x = elements(of_all);
    add_bias(block.bias[static_cast<size_t>(role)], x, head * dim, (head + 1) * dim);
    if (role == Role::kV) return;
    if (norm != nullptr)
      norm_rows(
          NormRows<uint16_t>{
              .x = x, .weight = norm, .y = x, .width = dim, .eps = static_cast<float>(spec_.norm_eps)},
          head, head + 1);
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
  for (int64_t i = share.begin(all); i < share.end(all); ++i)
    if (i < heads) {
      prepare(Role::kQ, block.query_norm, queries_, i);
    } else if (i < heads + kv_heads) {
      prepare(Role::kK, block.key_norm, keys_, i - heads);
      append(keys_, cache.keys(index), i - heads);
    } else {
      prepare(Role::kV, nullptr, values_, i - heads - kv_heads);
      append(values_, cache.values(index), i - heads - kv_heads);
    }
}

}  // namespace stbllm
