#pragma once
// A quantization method as a value. RTN-binary, BiLLM and STBLLM are recipes; an ablation is an edit of one
// field. The presets are the files of configs/, compiled in.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "stbllm/base/nm_pattern.h"

namespace stbllm {

/// Which weights of a group are kept.
enum class Importance {
  kMagnitude,  ///< |W|
  kWanda,      ///< |W_ij| S_j, S_j = ||X_j||_2
  kRia,        ///< (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) S_j^0.5            (released STBLLM code)
  kSi,         ///< the same sum standardised over the layer, times S_j               (STBLLM, "Standardized
               ///< Importance")
  kObs,        ///< W_ij^2 / d_j^2, d = diag of the upper Cholesky factor of H^-1
};

/// How the error of quantized columns is pushed into those that follow.
enum class Compensate {
  kNone,
  kBlock,   ///< once per column block, error divided by the diagonal (BiLLM, STBLLM)
  kColumn,  ///< group by group with the full triangular factor (GPTQ's inner loop on groups)
};

/// What the searches for the salient columns and for the trisection measure.
enum class SearchOn {
  kWeights,   ///< squared error of the kept weights, columns weighted by 1 / d_j^2
  kSaliency,  ///< squared error of binarizing the matrix W^2 / d^2 itself            (released STBLLM code)
};

/// How the code of each linear follows from the recipe's (plan/allocate.h): norm and outlier vary N from
/// block to block, budget N, M and levels from linear to linear, to spend Recipe::target_bpw well.
enum class Allocation { kUniform, kNorm, kOutlier, kBudget };

/// How a table of rows (embedding, head) is stored.
enum class RowCoding { kKeep, kFloat16, kInt8, kInt4 };

struct Recipe {
  std::string name = "custom";
  NmPattern nm{4, 8};  ///< target; the allocation may give single linears another N
  Allocation allocation = Allocation::kUniform;
  double target_bpw = 0;  ///< stored bits per weight of the linears that allocation `budget` may use
  Importance importance = Importance::kMagnitude;
  int levels = 1;          ///< magnitude levels of kept weights, 1..3 (3 = trisection)
  int max_salient = 0;     ///< salient columns tried per column block, 0..50
  int column_block = 128;  ///< columns that share a scale
  int scale_bits =
      16;  ///< 16: fp16 scale per row, column block and level; 4..6: log codes, levels per linear
  Compensate compensate = Compensate::kBlock;
  SearchOn search_on = SearchOn::kWeights;
  bool support_carried = true;  ///< false: pruned weights come back as in the released code; not packable
  bool means = false;           ///< binarize around the mean of each set (released code); not packable
  bool upper_quantile_rule = false;  ///< skip p1 with 2 p1 above the 0.90 quantile (released code)
  double damping = 0.01;             ///< of mean(diag H), for the Cholesky factor only
  double shrink = 0;                 ///< H' = (1 - s) H + s diag(H); below 0: chosen on held-out windows
  double outlier_share = 0;    ///< a column with at least this share of trace(H) is stored exactly; 0: none
  int max_outliers = 0;        ///< at most so many
  bool token_weights = false;  ///< w_t = min(1, 3 median / ||x_t||) on the rows of X in H
  int refit = 0;    ///< least squares for all scales in the H metric, after the first codes and after so many
                    ///< sweeps; 0: never
  int descend = 0;  ///< sweeps of coordinate descent over group codes, alternating with refit
  RowCoding embedding = RowCoding::kKeep;
  RowCoding head = RowCoding::kKeep;
  int tune_epochs = 0;          ///< block-wise reconstruction through autograd; 0: none
  double tune_lr = 0.005;       ///< Adam's step for scales, norms and biases, relative to their size
  double tune_code_lr = 0.005;  ///< the same for the latent weights behind the codes; 0: codes stay
  int distill_epochs = 0;       ///< the whole model against the dense model's logits; 0: none
  double distill_lr = 0.002;    ///< as tune_lr
  double distill_code_lr =
      0.001;  ///< as tune_code_lr; above 0, sixteen bytes per weight of the model stay in memory

  /// True when codes are chosen by exhaustive group search with shared levels, which refit and descend need.
  bool lean() const { return max_salient == 0 && (levels == 1 || scale_bits < 16); }
  /// True when the result has a packed form.
  bool packable() const { return support_carried && !means; }
  /// Throws Error(kUsage) naming the field that is out of range or does not go with another.
  void validate() const;

  /// A preset by name, or the recipe in a JSON file when `name_or_path` ends in .json. Fields that a file
  /// leaves out keep the defaults above; an unknown field is an error. Throws Error(kUsage | kNotFound).
  static Recipe load(const std::string& name_or_path);
  static Recipe from_json(const nlohmann::json& json);
  nlohmann::json to_json() const;
  static std::vector<std::string> preset_names();
};

}  // namespace stbllm
