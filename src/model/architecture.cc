#include "stbllm/model/architecture.h"

#include <array>
#include <string>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

constexpr Flag kNoBias{"", false};
constexpr Flag kBias{"", true};
constexpr Flag kAttentionBias{"attention_bias", false};
constexpr Flag kMlpBias{"mlp_bias", false};
constexpr Flag kEnableBias{"enable_bias", true};

constexpr std::array<LinearSlot, 7> gated_linears(Flag qkv_bias, Flag output_bias, Flag mlp_bias) {
  return {{{Role::kQ, Tap::kAttnIn, "self_attn.q_proj", qkv_bias},
           {Role::kK, Tap::kAttnIn, "self_attn.k_proj", qkv_bias},
           {Role::kV, Tap::kAttnIn, "self_attn.v_proj", qkv_bias},
           {Role::kO, Tap::kAttnOut, "self_attn.o_proj", output_bias},
           {Role::kGate, Tap::kMlpIn, "mlp.gate_proj", mlp_bias},
           {Role::kUp, Tap::kMlpIn, "mlp.up_proj", mlp_bias},
           {Role::kDown, Tap::kMlpMid, "mlp.down_proj", mlp_bias}}};
}
constexpr auto kLlamaLinears = gated_linears(kAttentionBias, kAttentionBias, kMlpBias);
constexpr auto kMistralLinears = gated_linears(kNoBias, kNoBias, kNoBias);
constexpr auto kQwen2Linears = gated_linears(kBias, kNoBias, kNoBias);
constexpr auto kQwen3Linears = gated_linears(kAttentionBias, kAttentionBias, kNoBias);
constexpr LinearSlot kOptLinears[] = {
    {Role::kQ, Tap::kAttnIn, "self_attn.q_proj", kEnableBias},
    {Role::kK, Tap::kAttnIn, "self_attn.k_proj", kEnableBias},
    {Role::kV, Tap::kAttnIn, "self_attn.v_proj", kEnableBias},
    {Role::kO, Tap::kAttnOut, "self_attn.out_proj", kEnableBias},
    {Role::kUp, Tap::kMlpIn, "fc1", kEnableBias},
    {Role::kDown, Tap::kMlpMid, "fc2", kEnableBias},
};

constexpr NormSlot kLlamaNorms[] = {
    {NormRole::kAttn, "input_layernorm"},
    {NormRole::kMlp, "post_attention_layernorm"},
};
constexpr NormSlot kQwen3Norms[] = {
    {NormRole::kAttn, "input_layernorm"},
    {NormRole::kQuery, "self_attn.q_norm"},
    {NormRole::kKey, "self_attn.k_norm"},
    {NormRole::kMlp, "post_attention_layernorm"},
};
constexpr NormSlot kOptNorms[] = {
    {NormRole::kAttn, "self_attn_layer_norm"},
    {NormRole::kMlp, "final_layer_norm"},
};

constexpr Architecture kLlama = {.hf_class = "LlamaForCausalLM",
                                 .norm = Norm::kRms,
                                 .position = Position::kRotary,
                                 .mlp = Mlp::kGated,
                                 .linears = kLlamaLinears,
                                 .norms = kLlamaNorms,
                                 .sliding_window = false,
                                 .default_window = 0,
                                 .default_head_dim = 0,
                                 .embedding = "embed_tokens",
                                 .positions = "",
                                 .blocks = "layers",
                                 .final_norm = "norm",
                                 .project_in = "",
                                 .project_out = "",
                                 .head = "lm_head",
                                 .ffn_key = "intermediate_size",
                                 .activation_key = "hidden_act",
                                 .tied_by_default = false};

constexpr Architecture mistral() {
  Architecture row = kLlama;
  row.hf_class = "MistralForCausalLM";
  row.linears = kMistralLinears;
  row.sliding_window = true;
  row.default_window = 4096;
  return row;
}

constexpr Architecture qwen2() {
  Architecture row = kLlama;
  row.hf_class = "Qwen2ForCausalLM";
  row.linears = kQwen2Linears;
  return row;
}

constexpr Architecture qwen3() {
  Architecture row = kLlama;
  row.hf_class = "Qwen3ForCausalLM";
  row.linears = kQwen3Linears;
  row.norms = kQwen3Norms;
  row.default_head_dim = 128;
  return row;
}

constexpr Architecture kOpt = {.hf_class = "OPTForCausalLM",
                               .norm = Norm::kLayer,
                               .position = Position::kLearned,
                               .mlp = Mlp::kPlain,
                               .linears = kOptLinears,
                               .norms = kOptNorms,
                               .sliding_window = false,
                               .default_window = 0,
                               .default_head_dim = 0,
                               .embedding = "decoder.embed_tokens",
                               .positions = "decoder.embed_positions",
                               .blocks = "decoder.layers",
                               .final_norm = "decoder.final_layer_norm",
                               .project_in = "decoder.project_in",
                               .project_out = "decoder.project_out",
                               .head = "lm_head",
                               .ffn_key = "ffn_dim",
                               .activation_key = "activation_function",
                               .tied_by_default = true};

constexpr Architecture kArchitectures[] = {kLlama, mistral(), qwen2(), qwen3(), kOpt};

}  // namespace

std::string_view role_name(Role role) {
  static constexpr std::array<std::string_view, kRoleCount> kNames = {"q",    "k",  "v",   "o",
                                                                      "gate", "up", "down"};
  return kNames[static_cast<size_t>(role)];
}

const Architecture& find_architecture(std::string_view hf_class) {
  std::string known;
  for (const Architecture& architecture : kArchitectures) {
    if (architecture.hf_class == hf_class) return architecture;
    known += (known.empty() ? "" : ", ") + std::string(architecture.hf_class);
  }
  fail(ErrorCode::kUnsupported,
       "config.json: architectures = [\"{}\"] is not supported; this program knows {}", hf_class, known);
}

}  // namespace stbllm
