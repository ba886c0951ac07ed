#pragma once
// The method of one linear, as a value: how its weights become structured binary ones. Which scheme (N:M and
// levels) a linear gets is not part of the method but of the plan of the model.

#include <optional>
#include <variant>

namespace stbllm {

/// How the error of quantized columns is pushed into those that follow.
enum class Compensate {
  kNone,
  kBlock,   ///< once per column block, error divided by the diagonal (BiLLM, STBLLM)
  kColumn,  ///< group by group with the full triangular factor (GPTQ's inner loop on groups); lean method
            ///< only
};

/// Columns whose inputs carry outsized energy are stored exactly, in fp16.
struct OutlierColumns {
  double share = 0.02;  ///< a column with at least this share of trace(H) is an outlier, in (0, 1]
  int limit = 2;        ///< at most so many columns of a linear, the largest first

  bool operator==(const OutlierColumns&) const = default;
};

/// Our own method. Every code is chosen by exhaustive search under the output error tr(D H D^T), with GPTQ's
/// feedback from group to group; scales and levels are then fitted, and codes chosen again given all others.
/// Levels are shared by the whole linear (with one fp16 scale per row and column block there is one level).
struct LeanMethod {
  int column_block = 128;  ///< columns that share a scale
  int scale_bits = 4;      ///< 4 .. 6: logarithmic codes under one fp16 scale per row; 16: an fp16 scale each
  Compensate compensate = Compensate::kColumn;
  double damping = 0.01;  ///< share of mean(diag H) added to the diagonal, for the Cholesky factor alone
  double shrink = 0.1;    ///< s in H' = (1 - s) H + s diag(H), in [0, 1)
  std::optional<OutlierColumns> outliers = OutlierColumns{};  ///< unset: every column is coded
  /// Whether the inputs of a linear are those that the already quantized linears of its block make, instead
  /// of those of the block's dense linears: statistics are taken tap by tap.
  bool sequential = true;
  /// a in the target W* = W + (a W C + b R) H^-1, in [0, 1]. C makes up for the difference between the
  /// quantized model's inputs and the dense model's (GPTAQ's and Qronos' asymmetric calibration).
  double asymmetry = 0.5;
  /// b, in [0, 1]. R makes up for the difference that the hidden states have already where the outputs of a
  /// linear are added to them, so that a block also mends what the blocks before it have lost.
  double residual = 0.5;
  bool token_weights = true;  ///< w_t = min(1, 3 median ||x|| / ||x_t||) on the tokens behind H
  int refit = 3;    ///< least squares for all scales in the metric of H: after the first codes and after so
                    ///< many sweeps of `descend`; 0: never
  int descend = 3;  ///< sweeps of coordinate descent over the codes of all groups
};

/// Which weights of a group the methods by regions keep.
enum class Importance {
  kMagnitude,  ///< |W|
  kWanda,      ///< |W_ij| S_j, S_j = ||X_j||_2
  kRia,        ///< (|W_ij| / sum_j |W_ij| + |W_ij| / sum_i |W_ij|) S_j^0.5         (released STBLLM code)
  kSi,         ///< the same sum standardised over the layer, times S_j  (STBLLM, "Standardized Importance")
  kObs,        ///< W_ij^2 / d_j^2, d = diag of the upper Cholesky factor of H^-1
};

/// What the methods by regions compute with the support and with the sets of weights.
enum class Arithmetic {
  /// The papers': N of M weights are kept and the others are zero. Sets are binarized around zero, the
  /// searches
  /// for salient columns and regions minimise the squared error of the kept weights over d_j^2.
  kPaper,
  /// That of STBLLM's released code, weight for weight: the whole layer is pruned first and then treated as
  /// dense, sets are binarized around their means, and the searches binarize the matrix W^2 / d^2 itself. The
  /// result is not N:M sparse and has no packed form.
  kReleased,
};

/// The method of the papers (BiLLM; STBLLM sections 3.2 - 3.4): a support by importance, salient columns with
/// residual binarization, regions of kept weights by magnitude (as many as the scheme has levels) with an
/// fp16 scale each, and compensation from column block to column block.
struct RegionMethod {
  Arithmetic arithmetic = Arithmetic::kPaper;
  Importance importance = Importance::kSi;
  int max_salient = 50;                        ///< salient columns tried per column block, 0 .. 50
  int column_block = 128;                      ///< columns that share scales
  Compensate compensate = Compensate::kBlock;  ///< not kColumn
  double damping = 0.01;                       ///< as in LeanMethod
};

using Method = std::variant<LeanMethod, RegionMethod>;

/// Whether the result of a method is N:M sparse, so that it can be packed.
inline bool has_packed_form(const Method& method) {
  const auto* regions = std::get_if<RegionMethod>(&method);
  return regions == nullptr || regions->arithmetic == Arithmetic::kPaper;
}
inline int column_block(const Method& method) {
  return std::visit([](const auto& m) { return m.column_block; }, method);
}
/// Bits of a stored scale.
inline int scale_bits(const Method& method) {
  const auto* lean = std::get_if<LeanMethod>(&method);
  return lean != nullptr ? lean->scale_bits : 16;
}
/// Whether statistics are taken tap by tap.
inline bool is_sequential(const Method& method) {
  const auto* lean = std::get_if<LeanMethod>(&method);
  return lean != nullptr && lean->sequential;
}
/// Whether inputs are compared with the dense model's.
inline bool is_asymmetric(const Method& method) {
  const auto* lean = std::get_if<LeanMethod>(&method);
  return lean != nullptr && (lean->asymmetry > 0 || lean->residual > 0);
}

}  // namespace stbllm
