#pragma once
// The model families as data: one row per HuggingFace class. The forward pass switches on Norm, Position and
// Mlp and follows the slots of linears and norms, never a model's name. A new family that fits these choices
// is a new row in architecture.cc and nothing else.

#include <cstdint>
#include <span>
#include <string_view>

namespace stbllm {

/// A place in a decoder block where the inputs of linears are observed. Linears of one tap share their input.
enum class Tap {
  kAttnIn,   ///< q, k, v read it
  kAttnOut,  ///< o reads it
  kMlpIn,    ///< gate, up read it
  kMlpMid,   ///< down reads it
};
/// Whether what the linears of a tap put out is added to the hidden states.
inline constexpr bool adds_to_hidden(Tap tap) { return tap == Tap::kAttnOut || tap == Tap::kMlpMid; }
inline constexpr int kTapCount = 4;
/// In the order of the forward pass.
inline constexpr Tap kTaps[kTapCount] = {Tap::kAttnIn, Tap::kAttnOut, Tap::kMlpIn, Tap::kMlpMid};

/// What a linear does in its block. A plain MLP has kUp and kDown (OPT's fc1 and fc2) and no kGate.
enum class Role { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr int kRoleCount = 7;
/// "q", "k", "v", "o", "gate", "up", "down"
std::string_view role_name(Role role);

/// A boolean of config.json: the value of `key` where the file has it, else `fallback`. With an empty key it
/// is always `fallback`.
struct Flag {
  std::string_view key;
  bool fallback = false;
};

struct LinearSlot {
  Role role;
  Tap tap;
  std::string_view name;  ///< within the block, "self_attn.q_proj"
  Flag bias;
};

/// What a norm is applied to. A query or key norm is applied to each head by itself, before rotation.
enum class NormRole { kAttn, kMlp, kQuery, kKey };
inline constexpr int kNormRoleCount = 4;

struct NormSlot {
  NormRole role;
  std::string_view name;  ///< within the block, "input_layernorm"
};

enum class Norm { kRms, kLayer };
enum class Position { kRotary, kLearned };
enum class Mlp { kGated, kPlain };  ///< down(act(gate(x)) * up(x)) | down(act(up(x)))

/// One row of the table. Tensor names are relative to the base model's prefix ("model."), except the head's.
struct Architecture {
  std::string_view hf_class;  ///< "LlamaForCausalLM"
  Norm norm;
  Position position;
  Mlp mlp;
  std::span<const LinearSlot> linears;  ///< in the order of the forward pass
  std::span<const NormSlot> norms;      ///< of a decoder block; the final norm is not among them
  bool sliding_window;       ///< config.json's "sliding_window" counts; else every token sees all before it
  int64_t default_window;    ///< the window where config.json does not mention it
  int64_t default_head_dim;  ///< of "head_dim" where it is absent; 0: hidden_size / num_attention_heads

  std::string_view embedding;   ///< "embed_tokens"
  std::string_view positions;   ///< "decoder.embed_positions", empty for rotary
  std::string_view blocks;      ///< "layers": block i is "layers.i."
  std::string_view final_norm;  ///< "norm"
  std::string_view project_in;  ///< "decoder.project_in", empty where embeddings are as wide as hidden states
  std::string_view project_out;
  std::string_view head;  ///< "lm_head"

  // Spellings of config.json
  std::string_view ffn_key;         ///< "intermediate_size"
  std::string_view activation_key;  ///< "hidden_act"
  bool tied_by_default;             ///< value of "tie_word_embeddings" when it is absent
};

/// Throws Error(kUnsupported) naming the class and those that are known.
const Architecture& find_architecture(std::string_view hf_class);

}  // namespace stbllm
