#pragma once
// Tiny random checkpoints: HuggingFace directories (config.json, safetensors, tokenizer.json) with the names
// and shapes of the real ones, small enough that a whole model runs in milliseconds.
//
//   TinyModel model = tiny_llama();
//   model.config["tie_word_embeddings"] = false;
//   write_checkpoint(directory, model);
//
// The values depend on the seed and the tensor's name alone, so that another dtype or another number of
// shards holds the same numbers.

#include <fmt/format.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "stbllm/base/bits.h"
#include "stbllm/base/safetensors.h"

namespace stbllm::test {

// --- tokenizer ---------------------------------------------------------------------------------------

inline const std::vector<std::string> kTinySpecialTokens = {"<s>", "<pad>", "</s>", "<unk>"};  // ids 0..3
// Merges of the byte-level alphabet; "Ġ" is the space.
inline const std::vector<std::string> kTinyMerges = {"Ġ t", "h e", "Ġt he", "Ġ a", "i n", "e r",
                                                     "o n", "Ġ s", "r e",   "a t", "n d", "Ġa nd"};
inline const int64_t kTinyVocabSize =
    static_cast<int64_t>(kTinySpecialTokens.size() + 256 + kTinyMerges.size());

/// GPT-2's printable character of a byte, in UTF-8.
inline std::string byte_character(int byte) {
  const auto printable = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
  int code = byte;
  if (!printable(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += !printable(b);
  }
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

/// A byte-level BPE that knows every byte; `first_token` opens every text (none when empty).
inline nlohmann::json tiny_tokenizer(const std::string& first_token) {
  nlohmann::json vocab, added = nlohmann::json::array();
  for (const std::string& token : kTinySpecialTokens) {
    added.push_back({{"id", vocab.size()},
                     {"content", token},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
    vocab[token] = vocab.size();
  }
  for (int byte = 0; byte < 256; ++byte) vocab[byte_character(byte)] = vocab.size();
  for (std::string merge : kTinyMerges) {
    merge.erase(merge.find(' '), 1);
    vocab[merge] = vocab.size();
  }
  nlohmann::json tokenizer = {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", nullptr},
      {"pre_tokenizer",
       {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
      {"post_processor", nullptr},
      {"decoder",
       {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", nullptr},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", false},
        {"byte_fallback", false},
        {"ignore_merges", false},
        {"vocab", vocab},
        {"merges", kTinyMerges}}}};
  if (!first_token.empty()) {
    const nlohmann::json first = {{"SpecialToken", {{"id", first_token}, {"type_id", 0}}}};
    const nlohmann::json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
    const nlohmann::json second = {{"Sequence", {{"id", "B"}, {"type_id", 1}}}};
    const nlohmann::json ids = nlohmann::json::array({vocab[first_token]});
    const nlohmann::json tokens = nlohmann::json::array({first_token});
    tokenizer["post_processor"] = {
        {"type", "TemplateProcessing"},
        {"single", {first, text}},
        {"pair", {first, text, second}},
        {"special_tokens", {{first_token, {{"id", first_token}, {"ids", ids}, {"tokens", tokens}}}}}};
  }
  return tokenizer;
}

// --- models ------------------------------------------------------------------------------------------

/// What write_checkpoint() writes; change `config` at will, the tensors follow it.
struct TinyModel {
  nlohmann::json config;
  std::string first_token;    ///< which the tokenizer puts before every text
  std::string dtype = "F32";  ///< "F32", "F16" or "BF16"
  int shards = 1;             ///< files; more than one come with an index
  uint64_t seed = 0;
};

/// Grouped queries (4 heads, 2 of keys), separate head, no biases; the ffn is no multiple of 16.
inline TinyModel tiny_llama() {
  return {{{"architectures", nlohmann::json::array({"LlamaForCausalLM"})},
           {"model_type", "llama"},
           {"hidden_size", 64},
           {"intermediate_size", 168},
           {"num_hidden_layers", 2},
           {"num_attention_heads", 4},
           {"num_key_value_heads", 2},
           {"max_position_embeddings", 128},
           {"vocab_size", kTinyVocabSize},
           {"hidden_act", "silu"},
           {"rms_norm_eps", 1e-5},
           {"rope_theta", 10000.0},
           {"rope_scaling", nullptr},
           {"attention_bias", false},
           {"mlp_bias", false},
           {"tie_word_embeddings", false},
           {"bos_token_id", 0},
           {"eos_token_id", 2}},
          "<s>"};
}

/// Attends to the last 16 tokens only.
inline TinyModel tiny_mistral() {
  TinyModel model = tiny_llama();
  model.config.update({{"architectures", nlohmann::json::array({"MistralForCausalLM"})},
                       {"model_type", "mistral"},
                       {"sliding_window", 16}});
  model.config.erase("attention_bias");
  model.config.erase("mlp_bias");
  return model;
}

/// Biases of queries, keys and values, tied head.
inline TinyModel tiny_qwen2() {
  TinyModel model = tiny_llama();
  model.config.update({{"architectures", nlohmann::json::array({"Qwen2ForCausalLM"})},
                       {"model_type", "qwen2"},
                       {"attention_bias", true},
                       {"tie_word_embeddings", true}});
  return model;
}

/// Norms of queries and keys, heads wider than hidden / heads.
inline TinyModel tiny_qwen3() {
  TinyModel model = tiny_llama();
  model.config.update({{"architectures", nlohmann::json::array({"Qwen3ForCausalLM"})},
                       {"model_type", "qwen3"},
                       {"head_dim", 24},
                       {"rms_norm_eps", 1e-6},
                       {"rope_theta", 1000000.0},
                       {"use_sliding_window", false},
                       {"sliding_window", nullptr},
                       {"max_window_layers", 2},
                       {"tie_word_embeddings", true}});
  model.config.erase("mlp_bias");
  return model;
}

/// Pre-norm, biases, tied head.
inline TinyModel tiny_opt() {
  return {{{"architectures", nlohmann::json::array({"OPTForCausalLM"})},
           {"model_type", "opt"},
           {"hidden_size", 64},
           {"ffn_dim", 176},
           {"num_hidden_layers", 2},
           {"num_attention_heads", 4},
           {"max_position_embeddings", 128},
           {"vocab_size", kTinyVocabSize},
           {"word_embed_proj_dim", 64},
           {"activation_function", "relu"},
           {"do_layer_norm_before", true},
           {"_remove_final_layer_norm", false},
           {"enable_bias", true},
           {"layer_norm_elementwise_affine", true},
           {"tie_word_embeddings", true},
           {"bos_token_id", 2},
           {"eos_token_id", 2},
           {"pad_token_id", 1}},
          "</s>"};
}

/// As opt-350m: post-norm, no final norm, a narrower embedding with projections in and out.
inline TinyModel tiny_opt_350m() {
  TinyModel model = tiny_opt();
  model.config.update({{"do_layer_norm_before", false}, {"word_embed_proj_dim", 32}});
  return model;
}

// --- tensors -----------------------------------------------------------------------------------------

using TensorShapes = std::map<std::string, std::vector<int64_t>>;

inline TensorShapes opt_shapes(const nlohmann::json& config) {
  const int64_t hidden = config["hidden_size"], ffn = config["ffn_dim"], vocab = config["vocab_size"];
  const int64_t word = config["word_embed_proj_dim"], positions = config["max_position_embeddings"];
  TensorShapes shapes;
  const auto linear = [&](const std::string& name, int64_t rows, int64_t cols) {
    shapes[name + ".weight"] = {rows, cols};
    if (config["enable_bias"]) shapes[name + ".bias"] = {rows};
  };
  const auto norm = [&](const std::string& name) {
    if (!config.value("layer_norm_elementwise_affine", true)) return;
    shapes[name + ".weight"] = {hidden};
    shapes[name + ".bias"] = {hidden};
  };
  const std::string decoder = "model.decoder.";
  shapes[decoder + "embed_tokens.weight"] = {vocab, word};
  shapes[decoder + "embed_positions.weight"] = {positions + 2, hidden};
  if (word != hidden) {
    shapes[decoder + "project_in.weight"] = {hidden, word};
    shapes[decoder + "project_out.weight"] = {word, hidden};
  }
  for (int64_t i = 0; i < config["num_hidden_layers"]; ++i) {
    const std::string block = decoder + "layers." + std::to_string(i) + ".";
    for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
      linear(block + "self_attn." + name, hidden, hidden);
    }
    linear(block + "fc1", ffn, hidden);
    linear(block + "fc2", hidden, ffn);
    norm(block + "self_attn_layer_norm");
    norm(block + "final_layer_norm");
  }
  if (config["do_layer_norm_before"] && !config["_remove_final_layer_norm"])
    norm(decoder + "final_layer_norm");
  if (!config["tie_word_embeddings"]) shapes["lm_head.weight"] = {vocab, word};
  return shapes;
}

/// LLaMA, Mistral, Qwen2 and Qwen3.
inline TensorShapes llama_shapes(const nlohmann::json& config) {
  const int64_t hidden = config["hidden_size"], ffn = config["intermediate_size"],
                vocab = config["vocab_size"];
  const int64_t heads = config["num_attention_heads"], kv_heads = config["num_key_value_heads"];
  const int64_t head_dim = config.value("head_dim", hidden / heads);
  const bool attention_bias = config.value("attention_bias", false),
             mlp_bias = config.value("mlp_bias", false);
  TensorShapes shapes;
  const auto linear = [&](const std::string& name, int64_t rows, int64_t cols, bool bias) {
    shapes[name + ".weight"] = {rows, cols};
    if (bias) shapes[name + ".bias"] = {rows};
  };
  shapes["model.embed_tokens.weight"] = {vocab, hidden};
  for (int64_t i = 0; i < config["num_hidden_layers"]; ++i) {
    const std::string block = "model.layers." + std::to_string(i) + ".";
    linear(block + "self_attn.q_proj", heads * head_dim, hidden, attention_bias);
    linear(block + "self_attn.k_proj", kv_heads * head_dim, hidden, attention_bias);
    linear(block + "self_attn.v_proj", kv_heads * head_dim, hidden, attention_bias);
    linear(block + "self_attn.o_proj", hidden, heads * head_dim,
           attention_bias && config["model_type"] != "qwen2");
    linear(block + "mlp.gate_proj", ffn, hidden, mlp_bias);
    linear(block + "mlp.up_proj", ffn, hidden, mlp_bias);
    linear(block + "mlp.down_proj", hidden, ffn, mlp_bias);
    shapes[block + "input_layernorm.weight"] = {hidden};
    shapes[block + "post_attention_layernorm.weight"] = {hidden};
    if (config["model_type"] == "qwen3")
      for (const char* name : {"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
        shapes[block + name] = {head_dim};
  }
  shapes["model.norm.weight"] = {hidden};
  if (!config["tie_word_embeddings"]) shapes["lm_head.weight"] = {vocab, hidden};
  return shapes;
}

inline TensorShapes tensor_shapes(const nlohmann::json& config) {
  return config["model_type"] == "opt" ? opt_shapes(config) : llama_shapes(config);
}

/// Gaussian values that keep a random model lively: linears 1/sqrt(cols), embeddings 0.3, norms 1 +- 0.1,
/// biases 0.1 (so that a bias that is forgotten shows).
inline std::vector<float> tensor_values(const std::string& name, const std::vector<int64_t>& shape,
                                        uint64_t seed) {
  std::vector<uint32_t> key(name.begin(), name.end());
  key.push_back(static_cast<uint32_t>(seed));
  key.push_back(static_cast<uint32_t>(seed >> 32));
  std::seed_seq sequence(key.begin(), key.end());
  std::mt19937_64 random(sequence);
  // Box-Muller by hand: the standard leaves the algorithm of normal_distribution open.
  const auto uniform = [&] { return (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53; };
  const auto normal = [&] {
    const double radius = std::sqrt(-2 * std::log(uniform()));
    return radius * std::cos(2 * std::numbers::pi * uniform());
  };
  const bool embedding = name.find("embed") != std::string::npos;
  const bool norm_weight = shape.size() == 1 && name.ends_with(".weight");
  const double mean = norm_weight ? 1.0 : 0.0;
  const double deviation = embedding           ? 0.3
                           : shape.size() == 2 ? 1 / std::sqrt(static_cast<double>(shape[1]))
                                               : 0.1;
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(mean + deviation * normal());
  return values;
}

/// `values` in the bytes of "F32", "F16" or "BF16", rounded to nearest even.
inline std::vector<std::byte> encode(std::span<const float> values, const std::string& dtype) {
  const int64_t size = dtype_bytes(dtype);
  std::vector<std::byte> bytes(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    if (dtype == "F16") bits = float_to_half(values[i]);
    if (dtype == "BF16") bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    std::memcpy(bytes.data() + i * size, &bits, size);  // little-endian: the low bytes come first
  }
  return bytes;
}

// --- files -------------------------------------------------------------------------------------------

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// Writes the checkpoint into `directory`, which is made when it is not there.
inline void write_checkpoint(const std::filesystem::path& directory, const TinyModel& model) {
  std::filesystem::create_directories(directory);
  nlohmann::json config = model.config;
  config["torch_dtype"] = model.dtype == "F16" ? "float16" : model.dtype == "BF16" ? "bfloat16" : "float32";
  write_text(directory / "config.json", config.dump(2));
  write_text(directory / "tokenizer.json", tiny_tokenizer(model.first_token).dump(2));
  nlohmann::json tokenizer_config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"eos_token", "</s>"}};
  if (!model.first_token.empty()) tokenizer_config["bos_token"] = model.first_token;
  write_text(directory / "tokenizer_config.json", tokenizer_config.dump(2));

  const TensorShapes shapes = tensor_shapes(config);
  const auto shard_of = [&](size_t i) { return static_cast<int>(i * model.shards / shapes.size()); };
  nlohmann::json index = {{"metadata", {{"total_size", 0}}}, {"weight_map", nlohmann::json::object()}};
  for (int shard = 0; shard < model.shards; ++shard) {
    const std::string file = model.shards == 1
                                 ? "model.safetensors"
                                 : fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, model.shards);
    SafetensorsWriter writer(directory / file, /*force=*/true);
    writer.set_metadata("format", "pt");
    size_t i = 0;
    for (const auto& [name, shape] : shapes) {
      if (shard_of(i++) != shard) continue;
      const std::vector<std::byte> bytes = encode(tensor_values(name, shape, model.seed), model.dtype);
      writer.add(name, model.dtype, shape, bytes);
      index["weight_map"][name] = file;
      index["metadata"]["total_size"] = index["metadata"]["total_size"].get<size_t>() + bytes.size();
    }
    writer.finish();
    writer.commit();
  }
  if (model.shards > 1) write_text(directory / "model.safetensors.index.json", index.dump(2));
}

}  // namespace stbllm::test
