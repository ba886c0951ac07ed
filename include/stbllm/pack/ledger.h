#pragma once
// Where the bytes of a packed file are: per kind of plane and per linear.

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "stbllm/pack/packed_file.h"

namespace stbllm {

struct LinearEntry {
  std::string name;
  Layout layout;
  int64_t bytes = 0;
  double stored_bits = 0;    ///< per weight, all planes
  double nominal_bits = 0;   ///< N/M (1 + share of salient columns)
  double output_error = -1;  ///< relative, as measured when it was quantized; -1: not recorded
  double holdout_error = -1;
};

/// A matrix of a decoder block that kept the checkpoint's weights.
struct KeptLinear {
  std::string name;
  int64_t rows = 0, cols = 0, bytes = 0;
};

struct Ledger {
  std::vector<LinearEntry> linears;
  std::vector<KeptLinear> kept_linears;
  std::map<std::string, int64_t> plane_bytes;  ///< "codes", "scales", ... summed over linears
  int64_t linear_weights = 0;
  int64_t linear_bytes = 0;
  int64_t dense_bytes = 0;  ///< embedding, head, norms, biases, kept linears
  int64_t file_bytes = 0;
  int64_t parameters = 0;   ///< of the whole model
  double nominal_bits = 0;  ///< mean over quantized weights
  double stored_bits = 0;   ///< of the quantized linears
  double file_bits = 0;     ///< 8 file_bytes / parameters
  double density = 0;       ///< mean N/M
};

Ledger make_ledger(const PackedReader& reader);
nlohmann::json to_json(const Ledger& ledger);

}  // namespace stbllm
