#include "stbllm/model/model_spec.h"

#include <fmt/ranges.h>

#include <set>

#include "stbllm/base/error.h"
#include "stbllm/base/json_fields.h"

namespace stbllm {
namespace {

using nlohmann::json;

/// With more blocks or wider ones than this a config.json is damaged. Numbers of weights stay below 2^63.
constexpr int64_t kMostBlocks = 1 << 12, kWidest = 1 << 22;

std::string architecture_class(const json& config) {
  const auto it = config.find("architectures");
  if (it == config.end() || !it->is_array() || it->empty() || !it->front().is_string())
    fail(ErrorCode::kUnsupported,
         "config.json: architectures does not name a class such as [\"LlamaForCausalLM\"]");
  return it->front().get<std::string>();
}

Activation read_activation(const JsonFields& config, std::string_view key, Mlp mlp) {
  const std::string name = config.text(key, mlp == Mlp::kGated ? "silu" : "relu");
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::kGeluTanh;
  config.refuse(key, "silu, relu, gelu, gelu_new and gelu_pytorch_tanh");
}

/// `fields` are those of the scaling: rope_scaling in older files, rope_parameters (which hold theta too) in
/// newer ones.
void read_rope_scaling(const JsonFields& fields, Rope& rope) {
  const std::string_view key = fields.has("rope_type") ? "rope_type" : "type";
  const std::string type = fields.text(key, "default");
  if (type == "default") return;
  if (type == "linear") {
    rope.scaling = Rope::Scaling::kLinear;
    rope.factor = fields.positive("factor");
  } else if (type == "llama3") {
    rope.scaling = Rope::Scaling::kLlama3;
    rope.factor = fields.positive("factor");
    rope.low_freq_factor = fields.positive("low_freq_factor");
    rope.high_freq_factor = fields.positive("high_freq_factor");
    rope.original_max_positions = fields.count("original_max_position_embeddings");
  } else {
    fields.refuse(key, "default, linear and llama3");
  }
}

Rope read_rope(const JsonFields& config) {
  Rope rope;
  rope.theta = config.positive("rope_theta", rope.theta);
  for (const std::string key : {"rope_scaling", "rope_parameters"}) {
    if (!config.has(key)) continue;
    const json& object = config.object(key);
    for (const json& value : object)  // newer files may give every kind of attention its own parameters
      if (value.is_object()) config.refuse(key, "one set of rotary parameters for all blocks");
    const JsonFields fields(object, fmt::format("config.json: {}.", key));
    rope.theta = fields.positive("rope_theta", rope.theta);
    if (fields.positive("partial_rotary_factor", 1.0) != 1.0) fields.refuse("partial_rotary_factor", "1.0");
    read_rope_scaling(fields, rope);
  }
  if (config.positive("partial_rotary_factor", 1.0) != 1.0) config.refuse("partial_rotary_factor", "1.0");
  return rope;
}

void check_attention_kinds(const JsonFields& config, bool sliding) {
  if (config.flag("use_sliding_window", false)) config.refuse("use_sliding_window", "false");
  if (!config.has("layer_types")) return;
  const std::string expected = sliding ? "sliding_attention" : "full_attention";
  for (const json& type : config.at("layer_types"))
    if (type != expected) config.refuse("layer_types", fmt::format("\"{}\" in every block here", expected));
}

/// Refuses what models that are derived from these classes, with code of their own, add to the forward pass.
void check_foreign_keys(const JsonFields& config) {
  for (const std::string_view key :
       {"attn_logit_softcapping", "final_logit_softcapping", "logits_scaling", "logit_scale",
        "residual_multiplier", "embedding_multiplier", "attention_multiplier", "scale_emb", "no_rope_layers",
        "use_qk_norm", "qk_layernorm", "clip_qkv"}) {
    if (!config.has(key)) continue;
    const json& value = config.at(key);
    const bool neutral = value == false || value == 1 || value == json::array();
    if (!neutral) config.refuse(key, "models without it");
  }
}

void read_heads(const JsonFields& config, const Architecture& row, ModelSpec& spec) {
  spec.heads = config.count("num_attention_heads");
  spec.kv_heads = config.count("num_key_value_heads", spec.heads);
  if (spec.heads % spec.kv_heads != 0)
    fail(ErrorCode::kCorrupt,
         "config.json: num_attention_heads = {} is not a multiple of num_key_value_heads = {}", spec.heads,
         spec.kv_heads);
  if (config.has("head_dim") || row.default_head_dim > 0) {
    spec.head_dim = config.count("head_dim", row.default_head_dim);
    return;
  }
  if (spec.hidden % spec.heads != 0)
    fail(ErrorCode::kCorrupt, "config.json: hidden_size = {} is not a multiple of num_attention_heads = {}",
         spec.hidden, spec.heads);
  spec.head_dim = spec.hidden / spec.heads;
}

void read_sizes(const JsonFields& config, const Architecture& row, ModelSpec& spec) {
  spec.hidden = config.count("hidden_size");
  spec.layers = config.count("num_hidden_layers");
  if (spec.layers > kMostBlocks)
    fail(ErrorCode::kCorrupt, "config.json: num_hidden_layers = {} must be at most {}", spec.layers,
         kMostBlocks);
  read_heads(config, row, spec);
  spec.ffn = config.count(row.ffn_key);
  const std::pair<std::string_view, int64_t> widths[] = {
      {"hidden_size", spec.hidden},
      {"num_attention_heads x head_dim", spec.heads * spec.head_dim},
      {row.ffn_key, spec.ffn}};
  for (const auto& [what, width] : widths)
    if (width > kWidest)
      fail(ErrorCode::kCorrupt, "config.json: {} = {} must be at most {}", what, width, kWidest);
  spec.vocab = config.count("vocab_size");
  spec.max_positions = config.count("max_position_embeddings");
  spec.embedding_width =
      row.project_in.empty() ? spec.hidden : config.count("word_embed_proj_dim", spec.hidden);
}

/// What positions do to attention: rotation or a learned table, and which tokens see each other.
void read_positions(const JsonFields& config, const Architecture& row, ModelSpec& spec) {
  if (row.position == Position::kRotary) {
    if (spec.head_dim % 2 != 0)
      fail(ErrorCode::kUnsupported, "config.json: head_dim = {} is odd, which rotary positions do not allow",
           spec.head_dim);
    spec.rope = read_rope(config);
  } else {
    spec.position_offset = 2;  // OPT keeps fairseq's two rows for padding
  }
  if (row.sliding_window)
    spec.sliding_window =
        config.count("sliding_window", config.mentions("sliding_window") ? 0 : row.default_window);
  check_attention_kinds(config, spec.sliding_window > 0);
}

void read_norms(const JsonFields& config, const Architecture& row, ModelSpec& spec) {
  // OPT's layer norms have PyTorch's default epsilon, which its config.json does not mention.
  spec.norm_eps = row.norm == Norm::kRms ? config.positive("rms_norm_eps", 1e-6) : 1e-5;
  spec.norm_affine = config.flag("layer_norm_elementwise_affine", true);
  spec.norm_first = config.flag("do_layer_norm_before", true);
  spec.has_final_norm = spec.norm_first && !config.flag("_remove_final_layer_norm", false);
}

std::string weight_name(const std::string& module) { return module + ".weight"; }

}  // namespace

ModelSpec ModelSpec::from_config(const json& object) {
  if (!object.is_object()) fail(ErrorCode::kCorrupt, "config.json: not a JSON object");
  const JsonFields config(object, "config.json: ");
  const Architecture& row = find_architecture(architecture_class(object));
  if (config.has("quantization_config")) config.refuse("quantization_config", "unquantized checkpoints");
  check_foreign_keys(config);

  ModelSpec spec;
  spec.architecture = &row;
  read_sizes(config, row, spec);
  read_positions(config, row, spec);
  read_norms(config, row, spec);
  spec.activation = read_activation(config, row.activation_key, row.mlp);
  spec.tied_head = config.flag("tie_word_embeddings", row.tied_by_default);
  for (const LinearSlot& slot : row.linears)
    spec.slot_bias.push_back(slot.bias.key.empty() ? slot.bias.fallback
                                                   : config.flag(slot.bias.key, slot.bias.fallback));
  spec.stop_ids = config.ids("eos_token_id");
  return spec;
}

ModelSpec ModelSpec::from_checkpoint(const Checkpoint& checkpoint) {
  ModelSpec spec = from_config(checkpoint.config());
  spec.detect_prefix([&](const std::string& linear) { return checkpoint.contains(weight_name(linear)); });
  spec.check_tensors(checkpoint);
  return spec;
}

ModelSpec ModelSpec::from_packed(const PackedReader& packed) {
  ModelSpec spec = from_config(packed.config());
  spec.detect_prefix([&](const std::string& linear) {
    return packed.linears().contains(linear) || packed.has_dense(weight_name(linear));
  });
  return spec;
}

void ModelSpec::detect_prefix(const std::function<bool(const std::string& linear)>& has_linear) {
  ModelSpec bare = *this;
  bare.prefix = "";
  if (!has_linear(linears(0).front().name) && has_linear(bare.linears(0).front().name)) prefix = "";
}

std::string ModelSpec::block_prefix(int64_t block) const {
  return fmt::format("{}{}.{}.", prefix, architecture->blocks, block);
}

std::vector<LinearSpec> ModelSpec::linears(int64_t block) const {
  const auto shape = [&](Role role) -> std::pair<int64_t, int64_t> {
    switch (role) {
      case Role::kQ:
        return {heads * head_dim, hidden};
      case Role::kK:
      case Role::kV:
        return {kv_heads * head_dim, hidden};
      case Role::kO:
        return {hidden, heads * head_dim};
      case Role::kGate:
      case Role::kUp:
        return {ffn, hidden};
      case Role::kDown:
        return {hidden, ffn};
    }
    STBLLM_CHECK(false, "role {}", static_cast<int>(role));
  };
  std::vector<LinearSpec> result;
  for (size_t i = 0; i < architecture->linears.size(); ++i) {
    const LinearSlot& slot = architecture->linears[i];
    const auto [rows, cols] = shape(slot.role);
    result.push_back(
        {block_prefix(block) + std::string(slot.name), slot.role, slot.tap, rows, cols, slot_bias[i]});
  }
  return result;
}

std::vector<NormSpec> ModelSpec::norms(int64_t block) const {
  std::vector<NormSpec> result;
  for (const NormSlot& slot : architecture->norms) {
    const bool of_a_head = slot.role == NormRole::kQuery || slot.role == NormRole::kKey;
    const int64_t width = of_a_head ? head_dim : hidden;
    const std::string name = block_prefix(block) + std::string(slot.name);
    result.push_back({.name = name, .role = slot.role, .width = width, .tensors = norm_tensors(name, width)});
  }
  return result;
}

std::vector<TensorSpec> ModelSpec::norm_tensors(const std::string& name, int64_t width) const {
  if (!norm_affine) return {};
  std::vector<TensorSpec> result = {{name + ".weight", {width}}};
  if (architecture->norm == Norm::kLayer) result.push_back({name + ".bias", {width}});
  return result;
}

TensorSpec ModelSpec::embedding() const {
  return {weight_name(prefix + std::string(architecture->embedding)), {vocab, embedding_width}};
}

TensorSpec ModelSpec::position_table() const {
  return {weight_name(prefix + std::string(architecture->positions)),
          {position_offset + max_positions, hidden}};
}

TensorSpec ModelSpec::head() const {
  if (tied_head) return embedding();
  return {weight_name(std::string(architecture->head)), {vocab, embedding_width}};
}

TensorSpec ModelSpec::project_in() const {
  return {weight_name(prefix + std::string(architecture->project_in)), {hidden, embedding_width}};
}

TensorSpec ModelSpec::project_out() const {
  return {weight_name(prefix + std::string(architecture->project_out)), {embedding_width, hidden}};
}

std::string ModelSpec::final_norm() const { return prefix + std::string(architecture->final_norm); }

std::vector<TensorSpec> ModelSpec::other_tensors() const {
  std::vector<TensorSpec> result = {embedding()};
  const auto add = [&](const std::vector<TensorSpec>& tensors) {
    result.insert(result.end(), tensors.begin(), tensors.end());
  };
  if (architecture->position == Position::kLearned) result.push_back(position_table());
  if (has_projections()) {
    result.push_back(project_in());
    result.push_back(project_out());
  }
  for (int64_t block = 0; block < layers; ++block) {
    for (const NormSpec& norm : norms(block)) add(norm.tensors);
    for (const LinearSpec& linear : linears(block))
      if (linear.has_bias) result.push_back(linear.bias());
  }
  if (has_final_norm) add(norm_tensors(final_norm(), hidden));
  if (!tied_head) result.push_back(head());
  return result;
}

int64_t ModelSpec::linear_weights() const {
  int64_t weights = 0;
  for (const LinearSpec& linear : linears(0)) weights += linear.rows * linear.cols;
  return weights * layers;
}

void ModelSpec::check_tensors(const Checkpoint& checkpoint) const {
  std::vector<TensorSpec> tensors = other_tensors();
  for (int64_t block = 0; block < layers; ++block)
    for (const LinearSpec& linear : linears(block)) tensors.push_back(linear.weight());
  for (const TensorSpec& tensor : tensors) {
    if (!checkpoint.contains(tensor.name))
      fail(ErrorCode::kMismatch, "{}: tensor {} is missing; {} with this config.json needs it",
           checkpoint.directory().string(), tensor.name, architecture->hf_class);
    const std::vector<int64_t> found = checkpoint.shape(tensor.name);
    if (found != tensor.shape)
      fail(ErrorCode::kMismatch, "{}: tensor {} has shape [{}], but config.json asks for [{}]",
           checkpoint.directory().string(), tensor.name, fmt::join(found, ", "),
           fmt::join(tensor.shape, ", "));
  }
  std::set<std::string> known;
  for (const TensorSpec& tensor : tensors) known.insert(tensor.name);
  const std::string blocks = prefix + std::string(architecture->blocks) + ".";
  for (const std::string& name : checkpoint.names())
    if (name.starts_with(blocks) && !known.contains(name) &&
        !name.ends_with(".inv_freq"))  // older files hold rotary frequencies
      fail(ErrorCode::kMismatch,
           "{}: tensor {} has no place in {} with this config.json, and what it does would be lost; correct "
           "config.json (a bias flag, the number of blocks), or remove the tensor",
           checkpoint.directory().string(), name, architecture->hf_class);
}

}  // namespace stbllm
