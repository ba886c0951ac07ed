#include "stbllm/model/decoder_block.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>
#include <numbers>

#include "stbllm/base/error.h"
#include "stbllm/model/attention.h"
#include "stbllm/model/fused.h"

namespace stbllm {
namespace {

/// x (batch, heads, tokens, head_dim): pairs (i, i + head_dim / 2) turn by their angle.
at::Tensor turn(const at::Tensor& x, const Positions& positions) {
  if (can_fuse(x)) return rotate(x, positions.cos, positions.sin);
  const std::vector<at::Tensor> half = x.chunk(2, -1);
  return x * positions.cos + at::cat({-half[1], half[0]}, -1) * positions.sin;
}

at::Tensor activate(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return at::silu(x);
    case Activation::kRelu:
      return at::relu(x);
    case Activation::kGelu:
      return at::gelu(x);
    case Activation::kGeluTanh:
      return at::gelu(x, "tanh");
  }
  STBLLM_CHECK(false, "activation {}", static_cast<int>(activation));
}

void observe(const TapObserver& observer, Tap tap, const at::Tensor& input) {
  if (observer) observer(tap, input);
}

}  // namespace

at::Tensor rope_frequencies(const ModelSpec& spec) {
  const Rope& rope = spec.rope;
  const at::Tensor exponent = at::arange(0, spec.head_dim, 2, at::kLong).to(at::kFloat) / spec.head_dim;
  const at::Tensor plain = 1.0 / at::pow(rope.theta, exponent);
  switch (rope.scaling) {
    case Rope::Scaling::kNone:
      return plain;
    case Rope::Scaling::kLinear:
      return plain / rope.factor;
    case Rope::Scaling::kLlama3:
      break;
  }
  // Long waves are slowed down by the factor, short ones stay, those between are blended.
  const at::Tensor wavelength = 2 * std::numbers::pi / plain;
  const double original = static_cast<double>(rope.original_max_positions);
  const double long_wave = original / rope.low_freq_factor;
  const double short_wave = original / rope.high_freq_factor;
  const at::Tensor keep =
      (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  const at::Tensor blended = (1 - keep) * plain / rope.factor + keep * plain;
  return at::where(wavelength > long_wave, plain / rope.factor,
                   at::where(wavelength < short_wave, plain, blended));
}

Positions::Positions(const ModelSpec& spec, int64_t first, int64_t count, at::ScalarType dtype,
                     at::Device device)
    : first(first),
      count(count),
      window_(spec.sliding_window),
      options_(at::TensorOptions().dtype(dtype).device(device)) {
  if (spec.architecture->position == Position::kRotary) {
    const at::Tensor position = at::arange(first, first + count, at::kFloat);
    const at::Tensor angle = at::outer(position, rope_frequencies(spec)).repeat({1, 2});
    const at::Tensor both = at::stack({angle.cos(), angle.sin()}).to(device, dtype);  // in one transfer
    cos = both[0];
    sin = both[1];
  }
}

const at::Tensor& Positions::mask() const {
  const int64_t total = first + count;
  const bool windowed = window_ > 0 && total > window_;
  if (mask_.defined() || count == 1 || (first == 0 && !windowed)) return mask_;
  const at::Tensor hidden = at::full({count, total}, -std::numeric_limits<float>::infinity(), options_);
  mask_ = hidden.triu(first + 1);
  if (windowed) mask_ += hidden.tril(first - window_);
  return mask_;
}

KeyValueCache::KeyValueCache(const ModelSpec& spec, int64_t batch, int64_t capacity, at::ScalarType dtype,
                             at::Device device)
    : capacity_(capacity) {
  const at::TensorOptions options = at::TensorOptions().dtype(dtype).device(device);
  for (int64_t block = 0; block < spec.layers; ++block) {
    keys_.push_back(at::empty({batch, spec.kv_heads, capacity, spec.head_dim}, options));
    values_.push_back(at::empty_like(keys_.back()));
  }
}

void KeyValueCache::check_room(int64_t tokens) const {
  if (length_ + tokens > capacity_)
    fail(ErrorCode::kUsage, "a key/value cache for {} tokens cannot take {}", capacity_, length_ + tokens);
}

void KeyValueCache::append(int64_t block, at::Tensor& keys, at::Tensor& values) {
  const int64_t end = length_ + keys.size(2);
  check_room(keys.size(2));
  const auto store = [&](const at::Tensor& cache, at::Tensor& fresh) {
    cache.slice(2, length_, end).copy_(fresh);
    fresh = cache.slice(2, 0, end);
  };
  store(keys_[static_cast<size_t>(block)], keys);
  store(values_[static_cast<size_t>(block)], values);
}

KeyValueCache KeyValueCache::repeated(int64_t batch, int64_t capacity) const {
  STBLLM_CHECK(capacity >= length_, "room for {} tokens for {}", capacity, length_);
  KeyValueCache result;
  result.capacity_ = capacity;
  result.length_ = length_;
  const auto repeat = [&](const at::Tensor& cache) {
    at::Tensor wide = at::empty({batch, cache.size(1), capacity, cache.size(3)}, cache.options());
    wide.slice(2, 0, length_).copy_(cache.slice(2, 0, length_));
    return wide;
  };
  for (const at::Tensor& keys : keys_) result.keys_.push_back(repeat(keys));
  for (const at::Tensor& values : values_) result.values_.push_back(repeat(values));
  return result;
}

at::Tensor apply_norm(const ModelSpec& spec, const NormWeights& norm, const at::Tensor& x) {
  const auto has_dtype = [&](const at::Tensor& own) {
    return !own.defined() || own.scalar_type() == x.scalar_type();
  };
  const bool fuses = has_dtype(norm.weight) && has_dtype(norm.bias) && can_fuse(x);
  if (spec.architecture->norm == Norm::kLayer) {
    if (fuses && !records_gradients(x) && !records_gradients(norm.weight))
      return layer_norm(x, norm.weight, norm.bias, spec.norm_eps);
    if (!norm.weight.defined() || !norm.weight.requires_grad())
      return at::layer_norm(x, {x.size(-1)}, norm.weight, norm.bias, spec.norm_eps);
    // The fused backward adds up the gradients of weight and bias thread by thread; these sums do not depend
    // on threads.
    const at::Tensor scaled = at::layer_norm(x, {x.size(-1)}, {}, {}, spec.norm_eps) * norm.weight;
    return norm.bias.defined() ? scaled + norm.bias : scaled;
  }
  if (fuses) return rms_norm(x, norm.weight, spec.norm_eps);
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor scale = at::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + spec.norm_eps);
  const at::Tensor normalized = (wide * scale).to(x.scalar_type());
  return norm.weight.defined() ? (normalized * norm.weight).to(x.scalar_type()) : normalized;
}

DecoderBlock::DecoderBlock(const ModelSpec& spec, int64_t index)
    : spec_(spec), index_(index), linear_specs_(spec.linears(index)), norm_specs_(spec.norms(index)) {
  for (const NormSpec& norm : norm_specs_) norms_[static_cast<size_t>(norm.role)].emplace();
}

NormWeights& DecoderBlock::norm(NormRole role) {
  std::optional<NormWeights>& norm = norms_[static_cast<size_t>(role)];
  STBLLM_CHECK(norm.has_value(), "block {} has no norm {}", index_, static_cast<int>(role));
  return *norm;
}

const Linear& DecoderBlock::linear(Role role) const {
  const auto& linear = linears_[static_cast<size_t>(role)];
  STBLLM_CHECK(linear != nullptr, "block {} has no linear {}", index_, role_name(role));
  return *linear;
}

const DenseLinear& DecoderBlock::dense(Role role) const {
  const auto* dense = dynamic_cast<const DenseLinear*>(&linear(role));
  STBLLM_CHECK(dense != nullptr, "linear {} of block {} is packed, where a dense weight is needed",
               role_name(role), index_);
  return *dense;
}

void DecoderBlock::set_linear(Role role, std::unique_ptr<Linear> linear) {
  linears_[static_cast<size_t>(role)] = std::move(linear);
}

at::Tensor DecoderBlock::forward(const at::Tensor& hidden, const Positions& positions,
                                 const TapObserver& observer, KeyValueCache* cache) const {
  STBLLM_CHECK(hidden.dim() == 3 && hidden.size(1) == positions.count,
               "hidden states for {} tokens, positions for {}", hidden.size(1), positions.count);
  BlockPass pass = begin(hidden, positions);
  for (const Tap tap : kTaps) {
    observe(observer, tap, pass.input);
    proceed(pass, tap, positions, cache);
  }
  return pass.hidden;
}

BlockPass DecoderBlock::begin(const at::Tensor& hidden, const Positions& positions) const {
  return {.hidden = hidden, .input = branch_input(NormRole::kAttn, hidden, positions.dtype())};
}

void DecoderBlock::proceed(BlockPass& pass, Tap from, const Positions& positions,
                           KeyValueCache* cache) const {
  switch (from) {
    case Tap::kAttnIn:
      pass.input = mix(pass.input, positions, cache);
      return;
    case Tap::kAttnOut:
      pass.hidden = add_branch(NormRole::kAttn, pass.hidden, linear(Role::kO).forward(pass.input));
      pass.input = branch_input(NormRole::kMlp, pass.hidden, positions.dtype());
      return;
    case Tap::kMlpIn:
      pass.input = mlp_middle(pass.input);
      return;
    case Tap::kMlpMid:
      pass.hidden = add_branch(NormRole::kMlp, pass.hidden, linear(Role::kDown).forward(pass.input));
      pass.input.reset();
      return;
  }
}

at::Tensor DecoderBlock::branch_input(NormRole norm, const at::Tensor& hidden, at::ScalarType dtype) const {
  return (spec_.norm_first ? normalize(norm, hidden) : hidden).to(dtype);
}

at::Tensor DecoderBlock::add_branch(NormRole norm, const at::Tensor& hidden, const at::Tensor& branch) const {
  return spec_.norm_first ? hidden + branch : normalize(norm, hidden + branch);
}

at::Tensor DecoderBlock::normalize(NormRole role, const at::Tensor& x) const {
  const std::optional<NormWeights>& norm = norms_[static_cast<size_t>(role)];
  return norm ? apply_norm(spec_, *norm, x) : x;
}

at::Tensor DecoderBlock::mix(const at::Tensor& x, const Positions& positions, KeyValueCache* cache) const {
  const auto by_head = [&](const at::Tensor& y, int64_t heads) {  // -> (batch, tokens, heads, head_dim)
    return y.view({x.size(0), x.size(1), heads, spec_.head_dim});
  };
  const std::array projections = {&linear(Role::kQ), &linear(Role::kK), &linear(Role::kV)};
  const std::vector<at::Tensor> projected = forward_all(projections, x);
  // All three: (batch, heads, tokens, head_dim). Norms come before the transposition, where rows are
  // adjacent.
  at::Tensor queries = normalize(NormRole::kQuery, by_head(projected[0], spec_.heads)).transpose(1, 2);
  at::Tensor keys = normalize(NormRole::kKey, by_head(projected[1], spec_.kv_heads)).transpose(1, 2);
  at::Tensor values = by_head(projected[2], spec_.kv_heads).transpose(1, 2);
  if (spec_.architecture->position == Position::kRotary) {
    queries = turn(queries, positions);
    keys = turn(keys, positions);
  }
  if (cache != nullptr) {
    STBLLM_CHECK(cache->length() == positions.first, "the cache holds {} tokens, positions start at {}",
                 cache->length(), positions.first);
    cache->append(index_, keys, values);
  }
  return attend(queries, keys, values, positions);
}

at::Tensor DecoderBlock::attend(const at::Tensor& queries, at::Tensor keys, at::Tensor values,
                                const Positions& positions) const {
  if (can_fuse(queries) && can_fuse(keys) && can_fuse(values))
    return causal_attention(queries, keys, values, positions.first, spec_.sliding_window);
  // A single query needs no mask: it gets only the keys that it sees.
  if (positions.count == 1 && spec_.sliding_window > 0 && keys.size(2) > spec_.sliding_window) {
    keys = keys.slice(2, keys.size(2) - spec_.sliding_window);
    values = values.slice(2, values.size(2) - spec_.sliding_window);
  }
  const std::optional<at::Tensor> mask =
      positions.mask().defined() ? std::optional(positions.mask()) : std::nullopt;
  const bool causal = !mask && positions.count > 1;
  const at::Tensor mixed =
      at::scaled_dot_product_attention(queries, keys, values, mask, /*dropout_p=*/0.0, causal,
                                       /*scale=*/std::nullopt, /*enable_gqa=*/spec_.heads != spec_.kv_heads);
  return mixed.transpose(1, 2).reshape({queries.size(0), queries.size(2), spec_.heads * spec_.head_dim});
}

at::Tensor DecoderBlock::mlp_middle(const at::Tensor& x) const {
  if (spec_.architecture->mlp == Mlp::kPlain) return activate(linear(Role::kUp).forward(x), spec_.activation);
  const std::array inputs = {&linear(Role::kGate), &linear(Role::kUp)};
  const std::vector<at::Tensor> gate_up = forward_all(inputs, x);
  return spec_.activation == Activation::kSilu && can_fuse(gate_up[0])
             ? silu_multiply(gate_up[0], gate_up[1])
             : activate(gate_up[0], spec_.activation) * gate_up[1];
}

}  // namespace stbllm
