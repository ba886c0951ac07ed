#pragma once
// A second, slow transformer: plain loops in double, written from the HuggingFace definitions alone, one
// token at a time. It reads config.json's keys itself and shares no code with src/model.

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "support/tiny_checkpoint.h"

namespace stbllm::test {

class NaiveTransformer {
 public:
  using Vector = std::vector<double>;
  using Matrix = std::vector<Vector>;  // one row per token

  explicit NaiveTransformer(const TinyModel& model) : config_(model.config) {
    for (const auto& [name, shape] : tensor_shapes(config_)) {
      const std::vector<float> values = tensor_values(name, shape, model.seed);
      tensors_[name] = Vector(values.begin(), values.end());
    }
    opt_ = config_["model_type"] == "opt";
    hidden_ = config_["hidden_size"];
    heads_ = config_["num_attention_heads"];
    kv_heads_ = config_.value("num_key_value_heads", heads_);
    head_dim_ = config_.value("head_dim", hidden_ / heads_);
  }

  Vector& tensor(const std::string& name) { return tensors_.at(name); }

  Matrix logits(const std::vector<int32_t>& ids) const {
    const std::string base = opt_ ? "model.decoder." : "model.";
    Matrix x;
    for (size_t t = 0; t < ids.size(); ++t) {
      const int64_t width = config_.value("word_embed_proj_dim", hidden_);
      Vector h = row(base + "embed_tokens.weight", ids[t], width);
      if (width != hidden_) h = linear(base + "project_in", h);
      if (opt_) h = sum(h, row(base + "embed_positions.weight", static_cast<int64_t>(t) + 2, hidden_));
      x.push_back(h);
    }
    const bool before = config_.value("do_layer_norm_before", true);
    for (int64_t i = 0; i < config_["num_hidden_layers"]; ++i) {
      const std::string block = base + "layers." + std::to_string(i) + ".";
      const std::string norm1 = block + (opt_ ? "self_attn_layer_norm" : "input_layernorm");
      const std::string norm2 = block + (opt_ ? "final_layer_norm" : "post_attention_layernorm");
      Matrix input = x;
      if (before)
        for (Vector& h : input) h = norm(norm1, h);
      const Matrix attended = attention(block + "self_attn.", input);
      for (size_t t = 0; t < x.size(); ++t) {
        Vector h = sum(x[t], attended[t]);
        if (!before) h = norm(norm1, h);
        h = sum(h, mlp(block, before ? norm(norm2, h) : h));
        x[t] = before ? h : norm(norm2, h);
      }
    }
    Matrix result;
    for (Vector h : x) {
      if (!opt_) h = norm("model.norm", h);
      if (opt_ && before && !config_.value("_remove_final_layer_norm", false))
        h = norm(base + "final_layer_norm", h);
      if (tensors_.contains(base + "project_out.weight")) h = linear(base + "project_out", h);
      const bool tied = config_.value("tie_word_embeddings", opt_);
      result.push_back(linear(tied ? base + "embed_tokens" : "lm_head", h));
    }
    return result;
  }

 private:
  static Vector sum(Vector a, const Vector& b) {
    for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
  }

  Vector row(const std::string& name, int64_t index, int64_t width) const {
    const Vector& table = tensors_.at(name);
    return {table.begin() + index * width, table.begin() + (index + 1) * width};
  }

  Vector linear(const std::string& name, const Vector& x) const {
    const Vector& weight = tensors_.at(name + ".weight");
    Vector y(weight.size() / x.size());
    for (size_t r = 0; r < y.size(); ++r)
      for (size_t c = 0; c < x.size(); ++c) y[r] += weight[r * x.size() + c] * x[c];
    const bool qwen2_output = config_["model_type"] == "qwen2" && name.ends_with("o_proj");  // has no bias
    if (tensors_.contains(name + ".bias") && !qwen2_output) y = sum(y, tensors_.at(name + ".bias"));
    return y;
  }

  Vector norm(const std::string& name, Vector x) const {
    const auto n = static_cast<double>(x.size());
    double mean = 0, variance = 0;
    if (opt_)
      for (const double v : x) mean += v / n;
    for (const double v : x) variance += (v - mean) * (v - mean) / n;
    const double epsilon = opt_ ? 1e-5 : config_["rms_norm_eps"].get<double>();
    for (double& v : x) v = (v - mean) / std::sqrt(variance + epsilon);
    if (!config_.value("layer_norm_elementwise_affine", true)) return x;
    for (size_t i = 0; i < x.size(); ++i) x[i] *= tensors_.at(name + ".weight")[i];
    return opt_ ? sum(x, tensors_.at(name + ".bias")) : x;
  }

  Vector mlp(const std::string& block, const Vector& x) const {
    const std::string kind =
        config_.value(opt_ ? "activation_function" : "hidden_act", opt_ ? "relu" : "silu");
    const auto act = [&](double v) {
      if (kind == "silu") return v / (1 + std::exp(-v));
      if (kind == "relu") return std::max(v, 0.0);
      if (kind == "gelu") return v * 0.5 * (1 + std::erf(v / std::numbers::sqrt2));
      return 0.5 * v * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (v + 0.044715 * v * v * v)));
    };
    Vector middle = linear(block + (opt_ ? "fc1" : "mlp.gate_proj"), x);
    for (double& v : middle) v = act(v);
    if (opt_) return linear(block + "fc2", middle);
    const Vector up = linear(block + "mlp.up_proj", x);
    for (size_t i = 0; i < middle.size(); ++i) middle[i] *= up[i];
    return linear(block + "mlp.down_proj", middle);
  }

  /// The i-th angular frequency with config.json's scaling applied.
  double frequency(int64_t i) const {
    nlohmann::json rope = nlohmann::json::object();
    for (const char* key : {"rope_scaling", "rope_parameters"})
      if (config_.contains(key) && config_[key].is_object()) rope = config_[key];
    const double theta = rope.value("rope_theta", config_.value("rope_theta", 10000.0));
    const std::string type = rope.value("rope_type", rope.value("type", "default"));
    const double plain = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim_));
    if (type == "default") return plain;
    const double factor = rope["factor"];
    if (type == "linear") return plain / factor;
    const double low = rope["low_freq_factor"], high = rope["high_freq_factor"];
    const double turns =
        rope["original_max_position_embeddings"].get<double>() * plain / (2 * std::numbers::pi);
    if (turns < low) return plain / factor;
    if (turns > high) return plain;
    const double keep = (turns - low) / (high - low);
    return plain * ((1 - keep) / factor + keep);
  }

  void rotate(Vector& x, size_t position) const {
    const int64_t half = head_dim_ / 2;
    for (size_t head = 0; head < x.size(); head += static_cast<size_t>(head_dim_))
      for (int64_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) * frequency(i);
        double& a = x[head + static_cast<size_t>(i)];
        double& b = x[head + static_cast<size_t>(i + half)];
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = turned;
      }
  }

  /// Each head of x through the norm, where the model has it.
  void norm_heads(const std::string& name, Vector& x) const {
    if (!tensors_.contains(name + ".weight")) return;
    for (auto head = x.begin(); head != x.end(); head += head_dim_)
      std::ranges::copy(norm(name, Vector(head, head + head_dim_)), head);
  }

  Matrix attention(const std::string& name, const Matrix& input) const {
    const std::string output = name + (opt_ ? "out_proj" : "o_proj");
    const bool windowed = config_["model_type"] == "mistral" && config_["sliding_window"].is_number();
    const int64_t window = windowed ? config_["sliding_window"].get<int64_t>() : 0;
    const auto dim = static_cast<size_t>(head_dim_);
    Matrix keys, values, result;
    for (size_t t = 0; t < input.size(); ++t) {
      Vector query = linear(name + "q_proj", input[t]);
      keys.push_back(linear(name + "k_proj", input[t]));
      values.push_back(linear(name + "v_proj", input[t]));
      norm_heads(name + "q_norm", query);
      norm_heads(name + "k_norm", keys.back());
      if (!opt_) {
        rotate(query, t);
        rotate(keys.back(), t);
      }
      Vector mixed(query.size());
      for (size_t head = 0; head < static_cast<size_t>(heads_); ++head) {
        const size_t q = head * dim, kv = head / static_cast<size_t>(heads_ / kv_heads_) * dim;
        const size_t first =
            window > 0 && static_cast<int64_t>(t) >= window ? t + 1 - static_cast<size_t>(window) : 0;
        Vector weight;
        double total = 0;
        for (size_t s = first; s <= t; ++s) {
          double score = 0;
          for (size_t i = 0; i < dim; ++i) score += query[q + i] * keys[s][kv + i];
          weight.push_back(std::exp(score / std::sqrt(static_cast<double>(dim))));
          total += weight.back();
        }
        for (size_t s = first; s <= t; ++s)
          for (size_t i = 0; i < dim; ++i) mixed[q + i] += weight[s - first] / total * values[s][kv + i];
      }
      result.push_back(linear(output, mixed));
    }
    return result;
  }

  nlohmann::json config_;
  std::map<std::string, Vector> tensors_;
  bool opt_;
  int64_t hidden_, heads_, kv_heads_, head_dim_;
};

}  // namespace stbllm::test
