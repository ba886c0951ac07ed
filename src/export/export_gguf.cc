#include "stbllm/export/export_gguf.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#include "gguf_tokenizer.h"
#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/log.h"
#include "stbllm/base/parallel.h"
#include "stbllm/model/decoder_block.h"
#include "stbllm/model/model_spec.h"
#include "stbllm/model/packed_tensors.h"

namespace stbllm {
namespace {

/// How llama.cpp runs a model family.
struct Family {
  std::string_view hf_class, name;
  bool interleaved_rope;  ///< pairs of neighbouring rows of q and k turn, not pairs half a head apart
};
constexpr Family kFamilies[] = {{"LlamaForCausalLM", "llama", true},
                                {"MistralForCausalLM", "llama", true},
                                {"Qwen2ForCausalLM", "qwen2", false},
                                {"Qwen3ForCausalLM", "qwen3", false}};

const Family& family_of(const ModelSpec& spec) {
  const std::string_view hf_class = spec.architecture->hf_class;
  const auto found = std::ranges::find(kFamilies, hf_class, &Family::hf_class);
  if (found == std::end(kFamilies))
    fail(ErrorCode::kUnsupported, "llama.cpp has no {}; export to hf instead", hf_class);
  if (spec.activation != Activation::kSilu)
    fail(ErrorCode::kUnsupported, "llama.cpp runs {} with the activation silu only; export to hf instead",
         hf_class);
  return *found;
}

std::string_view name_of(Role role) {
  constexpr std::string_view kNames[kRoleCount] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                                   "ffn_gate", "ffn_up", "ffn_down"};
  return kNames[static_cast<size_t>(role)];
}

std::string_view name_of(NormRole role) {
  switch (role) {
    case NormRole::kAttn:
      return "attn_norm";
    case NormRole::kMlp:
      return "ffn_norm";
    case NormRole::kQuery:
      return "attn_q_norm";
    case NormRole::kKey:
      return "attn_k_norm";
  }
  STBLLM_CHECK(false, "norm {}", static_cast<int>(role));
}

/// Which row of a tensor of the checkpoint stands in a row of the GGUF file.
using RowOrder = std::function<int64_t(int64_t row)>;

/// For q and k, whose heads turn pairs (i, i + head_dim / 2) in the checkpoint and (2 i, 2 i + 1) there.
RowOrder row_order(const Family& family, const ModelSpec& spec, Role role) {
  if (!family.interleaved_rope || (role != Role::kQ && role != Role::kK))
    return [](int64_t row) { return row; };
  return [width = spec.head_dim](int64_t row) {
    const int64_t head = row / width, within = row % width;
    return head * width + within % 2 * (width / 2) + within / 2;
  };
}

class GgufExport {
 public:
  GgufExport(const PackedReader& packed, const GgufOptions& options)
      : packed_(packed),
        options_(options),
        spec_(ModelSpec::from_packed(packed)),
        family_(family_of(spec_)),
        tensors_(packed) {}

  /// After the tensors, whose types it knows.
  void add_keys(const std::string& name) {
    const auto key = [&](std::string_view rest) { return fmt::format("{}.{}", family_.name, rest); };
    const auto set_count = [&](std::string_view rest, int64_t value) {
      file_.set(key(rest), static_cast<uint32_t>(value));
    };
    file_.set("general.architecture", family_.name);
    file_.set("general.name", name);
    file_.set("general.file_type", file_type());
    file_.set("general.quantization_version", uint32_t{2});
    set_count("context_length", context());
    set_count("embedding_length", spec_.hidden);
    set_count("block_count", spec_.layers);
    set_count("feed_forward_length", spec_.ffn);
    set_count("attention.head_count", spec_.heads);
    set_count("attention.head_count_kv", spec_.kv_heads);
    set_count("attention.key_length", spec_.head_dim);
    set_count("attention.value_length", spec_.head_dim);
    set_count("rope.dimension_count", spec_.head_dim);
    set_count("vocab_size", spec_.vocab);
    file_.set(key("attention.layer_norm_rms_epsilon"), static_cast<float>(spec_.norm_eps));
    file_.set(key("rope.freq_base"), static_cast<float>(spec_.rope.theta));
    if (spec_.rope.scaling == Rope::Scaling::kLinear) {
      file_.set(key("rope.scaling.type"), "linear");
      file_.set(key("rope.scaling.factor"), static_cast<float>(spec_.rope.factor));
    }
    add_tokenizer(file_, *Tokenizer::from_serialized(packed_.metadata("tokenizer")), spec_.vocab);
  }

  void add_tensors() {
    if (spec_.rope.scaling == Rope::Scaling::kLlama3) add_rope_factors();
    add_table(spec_.embedding(), "token_embd.weight");
    for (int64_t i = 0; i < spec_.layers; ++i) {
      const std::string block = fmt::format("blk.{}.", i);
      for (const NormSpec& norm : spec_.norms(i))
        for (const TensorSpec& tensor : norm.tensors)
          add_vector(tensor, block + std::string(name_of(norm.role)));
      for (const LinearSpec& linear : spec_.linears(i))
        add_linear(linear, block + std::string(name_of(linear.role)));
    }
    for (const TensorSpec& tensor : spec_.norm_tensors(spec_.final_norm(), spec_.hidden))
      add_vector(tensor, "output_norm");
    if (!spec_.tied_head) add_table(spec_.head(), "output.weight");
  }

  GgufSummary write(const std::filesystem::path& path) {
    file_.write(path, options_.force);
    summary_.bytes = static_cast<int64_t>(std::filesystem::file_size(path));
    return summary_;
  }

 private:
  /// llama.cpp's number for what most linears are.
  uint32_t file_type() const {
    const auto most =
        std::ranges::max_element(summary_.linears, {}, [](const auto& row) { return row.second; });
    const GgufType type = most == summary_.linears.end() ? GgufType::kF16 : most->first;
    return type == GgufType::kTQ1_0 ? 36 : type == GgufType::kTQ2_0 ? 37 : type == GgufType::kQ4_0 ? 2 : 1;
  }

  /// llama.cpp lets tokens of these families see all before them, which is the same up to the window.
  int64_t context() const {
    if (spec_.sliding_window == 0 || spec_.sliding_window >= spec_.max_positions) return spec_.max_positions;
    log::warn("llama.cpp has no sliding window for {}: the file says that contexts end at its {} tokens",
              spec_.architecture->hf_class, spec_.sliding_window);
    return spec_.sliding_window;
  }

  /// Adds `values` in `dtype`, their rows (dimension 0) in `order`.
  void add_floats(const std::string& name, const at::Tensor& values, at::ScalarType dtype,
                  const RowOrder& order = {}) {
    const GgufType type = dtype == at::kFloat  ? GgufType::kF32
                          : dtype == at::kHalf ? GgufType::kF16
                                               : GgufType::kBF16;
    file_.add(name, type, values.sizes().vec(), [values, dtype, order](std::span<std::byte> bytes) {
      at::Tensor ordered = values;
      if (order) {
        const at::Tensor rows = at::empty({values.size(0)}, at::kLong);
        for (int64_t row = 0; row < rows.numel(); ++row) rows.data_ptr<int64_t>()[row] = order(row);
        ordered = values.index_select(0, rows);
      }
      const at::Tensor stored = ordered.to(dtype).contiguous();
      std::memcpy(bytes.data(), stored.const_data_ptr(), bytes.size());
    });
  }

  /// Weight or bias of a norm, in float32 as llama.cpp wants it.
  void add_vector(const TensorSpec& tensor, const std::string& name) {
    add_floats(name + tensor.name.substr(tensor.name.rfind('.')), tensors_.load(tensor), at::kFloat);
  }

  void add_rope_factors() {
    ModelSpec plain = spec_;
    plain.rope.scaling = Rope::Scaling::kNone;
    add_floats("rope_freqs.weight", rope_frequencies(plain) / rope_frequencies(spec_), at::kFloat);
  }

  /// Embedding or head.
  void add_table(const TensorSpec& table, const std::string& name) {
    if (const QuantizedRows* rows = tensors_.find_rows(table)) {
      add_rows(*rows, name);
      return;
    }
    const at::Tensor values = tensors_.load(table);
    add_floats(name, values, values.scalar_type());
  }

  /// Integers with a scale per 64 columns are two blocks of 32 with that scale.
  void add_rows(const QuantizedRows& rows, const std::string& name) {
    constexpr int64_t kBlock = 32;
    const QuantizedRows::Layout layout = rows.layout();
    if (layout.cols % kBlock != 0)
      fail(ErrorCode::kUnsupported,
           "{}: rows of {} columns are no multiple of the 32 of a block of llama.cpp; quantize with "
           "--set model.embedding=fp16 model.head=fp16",
           name, layout.cols);
    const GgufType type = layout.bits == 8 ? GgufType::kQ8_0 : GgufType::kQ4_0;
    file_.add(name, type, {layout.rows, layout.cols}, [rows, layout, type](std::span<std::byte> bytes) {
      const int64_t row_bytes = std::ssize(bytes) / layout.rows;
      parallel_for(layout.rows, 64, [&](int64_t begin, int64_t end) {
        std::vector<int8_t> integers(static_cast<size_t>(layout.cols));
        std::vector<uint16_t> scales(static_cast<size_t>(layout.cols / kBlock));
        for (int64_t row = begin; row < end; ++row) {
          for (int64_t c = 0; c < layout.cols; ++c) integers[c] = static_cast<int8_t>(rows.integer(row, c));
          for (int64_t b = 0; b < std::ssize(scales); ++b)
            scales[b] = float_to_half(rows.scale(row, b * kBlock / QuantizedRows::kColumnBlock));
          encode_integers(type, integers, scales, bytes.subspan(row * row_bytes, row_bytes));
        }
      });
    });
  }

  void add_linear(const LinearSpec& linear, const std::string& name) {
    const RowOrder order = row_order(family_, spec_, linear.role);
    if (const StructuredBinaryMatrix* matrix = tensors_.find_linear(linear))
      add_matrix(linear, *matrix, order, name + ".weight");
    else
      add_floats(name + ".weight", tensors_.load(linear.weight()), at::kHalf, order);
    if (linear.has_bias) add_floats(name + ".bias", tensors_.load(linear.bias()), at::kFloat, order);
  }

  void add_matrix(const LinearSpec& linear, const StructuredBinaryMatrix& matrix, const RowOrder& order,
                  const std::string& name) {
    const Layout& layout = matrix.layout();
    const std::string obstacle = obstacle_to_ternary(layout);
    if (!obstacle.empty() && !options_.dequantize)
      fail(ErrorCode::kUnsupported,
           "linear {} {}, and llama.cpp's ternary types hold one magnitude per 256 columns; quantize with "
           "--recipe gguf-ternary, with --keep for linears of such a width, or pass --dequantize, which "
           "writes "
           "them as F16",
           linear.name, obstacle);
    const GgufType type = !obstacle.empty()                                         ? GgufType::kF16
                          : layout.cols % gguf_block_weights(options_.ternary) == 0 ? options_.ternary
                                                                                    : GgufType::kQ4_0;
    ++summary_.linears[type];
    const int64_t rows = layout.rows, cols = layout.cols;
    file_.add(name, type, {rows, cols}, [matrix, order, rows, cols, type](std::span<std::byte> bytes) {
      const int64_t row_bytes = std::ssize(bytes) / rows;
      parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
        std::vector<float> weights(static_cast<size_t>(cols));
        for (int64_t row = begin; row < end; ++row) {
          matrix.decode_row(order(row), weights.data());
          encode_row(type, weights, bytes.subspan(row * row_bytes, row_bytes));
        }
      });
    });
  }

  static void encode_row(GgufType type, std::span<const float> weights, std::span<std::byte> out) {
    if (type != GgufType::kF16) {
      STBLLM_CHECK(encode_ternary(type, weights, out), "a row is not ternary");
      return;
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const uint16_t half = float_to_half(weights[i]);
      std::memcpy(out.data() + i * sizeof half, &half, sizeof half);
    }
  }

  /// Empty where every block of 256 columns has one magnitude in fp16.
  static std::string obstacle_to_ternary(const Layout& layout) {
    constexpr int64_t kBlock = 256, kSmallestBlock = 32;
    if (layout.levels > 1) return fmt::format("has {} levels", layout.levels);
    if (layout.salient > 0) return "has salient columns";
    if (layout.outliers > 0) return "has outlier columns";
    if (layout.scale_bits < 16) return fmt::format("has scales of {} bits", layout.scale_bits);
    if (layout.column_block % kBlock != 0)
      return fmt::format("has a scale per {} columns", layout.column_block);
    if (layout.cols % kSmallestBlock != 0)
      return fmt::format("has {} columns, no multiple of 32", layout.cols);
    return "";
  }

  const PackedReader& packed_;
  const GgufOptions& options_;
  const ModelSpec spec_;
  const Family& family_;
  const PackedTensors tensors_;
  GgufWriter file_;
  GgufSummary summary_;
};

}  // namespace

GgufSummary export_gguf(const PackedReader& packed, const std::filesystem::path& path,
                        const GgufOptions& options) {
  GgufExport model(packed, options);
  model.add_tensors();
  model.add_keys(packed.file()->file()->path().stem().string());
  return model.write(path);
}

}  // namespace stbllm
