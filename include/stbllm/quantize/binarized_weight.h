#pragma once
// The canonical result of quantizing one linear: what the packer stores, what the tests check, what the
// forward uses.

#include <ATen/ATen.h>

#include "stbllm/base/nm_pattern.h"
#include "stbllm/base/scale_codes.h"

namespace stbllm {

/// A matrix of kept weights sign * scale(row, column block, level), plus residual signs in salient columns,
/// plus exact outlier columns. Scales are values that the packed coding can represent, so that packing loses
/// nothing.
struct BinarizedWeight {
  NmPattern nm;
  int levels = 1;
  int column_block = 128;
  int scale_bits = 16;

  at::Tensor symbols;  ///< int8 (rows, cols): 0 = pruned, +-(1 + level) = kept; level 0 in salient and
                       ///< outlier columns
  at::Tensor scales;   ///< float32 (rows, column blocks, slots); slots = levels (+ 2 with salient columns),
                       ///< fp16 values
                       ///<   when scale_bits == 16, else row_scales * 2^(-code ..) * level_values
  at::Tensor scale_codes;      ///< uint8 (rows, column blocks)                 when scale_bits < 16
  at::Tensor row_scales;       ///< float32 (rows), fp16 values                 when scale_bits < 16
  at::Tensor level_values;     ///< float32 (slots), fp16 values                when scale_bits < 16
  at::Tensor salient_columns;  ///< int32 (salient), ascending
  at::Tensor salient_signs;    ///< int8 (salient, rows): +-1
  at::Tensor outlier_columns;  ///< int32 (outliers), ascending
  at::Tensor outlier_values;   ///< float32 (outliers, rows), fp16 values
  at::Tensor unpackable;  ///< float32 (rows, cols): set instead of all the rest by recipes that keep means or
                          ///< drop the support

  int64_t rows() const { return (unpackable.defined() ? unpackable : symbols).size(0); }
  int64_t cols() const { return (unpackable.defined() ? unpackable : symbols).size(1); }
  bool has_salient() const { return salient_columns.defined() && salient_columns.numel() > 0; }
  bool has_outliers() const { return outlier_columns.defined() && outlier_columns.numel() > 0; }

  /// The weights, float32 (rows, cols): each equal to what the packed decode rule gives.
  at::Tensor to_dense() const;
  /// Share of columns that are salient, for the nominal bits N/M (1 + share).
  double salient_share() const;
  /// Recomputes `scales` from row_scales, scale_codes and level_values.
  void expand_scales();
};

/// The relative squared error of a linear's outputs, tr(D H D^T) / tr(W H W^T) with D = quantized - weight,
/// for one W and as many D as there are. H is symmetric; products run where it is.
class OutputError {
 public:
  /// weight (rows, cols), hessian (cols, cols)
  OutputError(const at::Tensor& weight, const at::Tensor& hessian);
  /// quantized (rows, cols)
  double operator()(const at::Tensor& quantized) const;
  /// Operations of the constructor, and of each call.
  static double flops(int64_t rows, int64_t cols);

 private:
  at::Tensor weight_, hessian_;
  double energy_;
};

}  // namespace stbllm
