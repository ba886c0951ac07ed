#include "stbllm/model/architecture.h"

#include <array>
#include <iterator>
#include <string>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

constexpr Flag kNoBias{"", false};
constexpr Flag kBias{"", true};
constexpr Flag kAttentionBias{"attention_bias", false};
constexpr Flag kMlpBias{"mlp_bias", false};
constexpr Flag kEnableBias{"enable_bias", true};

constexpr LinearSlot kLlamaLinears[] = {
    {Role::kQ, Tap::kAttnIn, "self_attn.q_proj", kAttentionBias},
    {Role::kK, Tap::kAttnIn, "self_attn.k_proj", kAttentionBias},
    {Role::kV, Tap::kAttnIn, "self_attn.v_proj", kAttentionBias},
    {Role::kO, Tap::kAttnOut, "self_attn.o_proj", kAttentionBias},
    {Role::kGate, Tap::kMlpIn, "mlp.gate_proj", kMlpBias},
    {Role::kUp, Tap::kMlpIn, "mlp.up_proj", kMlpBias},
    {Role::kDown, Tap::kMlpMid, "mlp.down_proj", kMlpBias},
};
constexpr LinearSlot kMistralLinears[] = {
    {Role::kQ, Tap::kAttnIn, "self_attn.q_proj", kNoBias},
    {Role::kK, Tap::kAttnIn, "self_attn.k_proj", kNoBias},
    {Role::kV, Tap::kAttnIn, "self_attn.v_proj", kNoBias},
    {Role::kO, Tap::kAttnOut, "self_attn.o_proj", kNoBias},
    {Role::kGate, Tap::kMlpIn, "mlp.gate_proj", kNoBias},
    {Role::kUp, Tap::kMlpIn, "mlp.up_proj", kNoBias},
    {Role::kDown, Tap::kMlpMid, "mlp.down_proj", kNoBias},
};
constexpr LinearSlot kQwen2Linears[] = {
    {Role::kQ, Tap::kAttnIn, "self_attn.q_proj", kBias},
    {Role::kK, Tap::kAttnIn, "self_attn.k_proj", kBias},
    {Role::kV, Tap::kAttnIn, "self_attn.v_proj", kBias},
    {Role::kO, Tap::kAttnOut, "self_attn.o_proj", kNoBias},
    {Role::kGate, Tap::kMlpIn, "mlp.gate_proj", kNoBias},
    {Role::kUp, Tap::kMlpIn, "mlp.up_proj", kNoBias},
    {Role::kDown, Tap::kMlpMid, "mlp.down_proj", kNoBias},
};
constexpr LinearSlot kOptLinears[] = {
    {Role::kQ, Tap::kAttnIn, "self_attn.q_proj", kEnableBias},
    {Role::kK, Tap::kAttnIn, "self_attn.k_proj", kEnableBias},
    {Role::kV, Tap::kAttnIn, "self_attn.v_proj", kEnableBias},
    {Role::kO, Tap::kAttnOut, "self_attn.out_proj", kEnableBias},
    {Role::kUp, Tap::kMlpIn, "fc1", kEnableBias},
    {Role::kDown, Tap::kMlpMid, "fc2", kEnableBias},
};

constexpr Architecture llama_like(std::string_view hf_class, std::span<const LinearSlot> linears,
                                  bool sliding_window, int64_t default_window) {
  return {.hf_class = hf_class,
          .norm = Norm::kRms,
          .position = Position::kRotary,
          .mlp = Mlp::kGated,
          .linears = linears,
          .sliding_window = sliding_window,
          .default_window = default_window,
          .embedding = "embed_tokens",
          .positions = "",
          .blocks = "layers",
          .attn_norm = "input_layernorm",
          .mlp_norm = "post_attention_layernorm",
          .final_norm = "norm",
          .project_in = "",
          .project_out = "",
          .head = "lm_head",
          .ffn_key = "intermediate_size",
          .activation_key = "hidden_act",
          .tied_by_default = false};
}

constexpr Architecture kArchitectures[] = {
    llama_like("LlamaForCausalLM", kLlamaLinears, /*sliding_window=*/false, 0),
    llama_like("MistralForCausalLM", kMistralLinears, /*sliding_window=*/true, /*default_window=*/4096),
    llama_like("Qwen2ForCausalLM", kQwen2Linears, /*sliding_window=*/false, 0),
    {.hf_class = "OPTForCausalLM",
     .norm = Norm::kLayer,
     .position = Position::kLearned,
     .mlp = Mlp::kPlain,
     .linears = kOptLinears,
     .sliding_window = false,
     .default_window = 0,
     .embedding = "decoder.embed_tokens",
     .positions = "decoder.embed_positions",
     .blocks = "decoder.layers",
     .attn_norm = "self_attn_layer_norm",
     .mlp_norm = "final_layer_norm",
     .final_norm = "decoder.final_layer_norm",
     .project_in = "decoder.project_in",
     .project_out = "decoder.project_out",
     .head = "lm_head",
     .ffn_key = "ffn_dim",
     .activation_key = "activation_function",
     .tied_by_default = true},
};

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
