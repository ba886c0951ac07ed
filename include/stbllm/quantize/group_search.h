#pragma once
// The best code of a group of M weights under a quadratic error, by trying every state.
//
// For a row with scale a, a metric A (M, M) and b = A w (M), a state v (values 0, +-level) costs
//   a^2 v^T A v - 2 a v^T b      (+ w^T A w),
// so per group of columns K = v^T A v is tabulated once for all rows, and a row needs N additions per state.
// Of v and -v only one is tried: the sign of v^T b decides.

#include <cstdint>
#include <span>
#include <vector>

#include "stbllm/base/nm_pattern.h"

namespace stbllm {

/// States with more than this many +- pairs are not enumerated; see improve_codes_locally().
inline constexpr int64_t kMaxEnumeratedStates = 10000;

class GroupCodebook {
 public:
  /// The states of a group of `width` <= M real columns (the last group of a row may be narrower): min(N,
  /// width) kept.
  GroupCodebook(NmPattern nm, int levels, int width);

  int kept() const { return kept_; }
  int64_t states() const { return static_cast<int64_t>(position_.size()) / kept_; }  ///< one of each +- pair
  const uint8_t* positions(int64_t state) const { return &position_[state * kept_]; }
  const int8_t* symbols(int64_t state) const {
    return &symbol_[state * kept_];
  }  ///< +-(1 + level), the last one positive
  /// The symbols of all columns of a group, pruned ones too: (states, words), four columns in a word, the
  /// first lowest.
  const uint32_t* packed() const { return packed_.data(); }
  int words() const { return words_; }
  /// Whether the states of such a group are few enough to be tried one by one.
  static bool enumerable(NmPattern nm, int levels);

 private:
  int kept_, words_;
  std::vector<uint8_t> position_;
  std::vector<int8_t> symbol_;
  std::vector<uint32_t> packed_;
};

/// The codebooks of a matrix with `cols` columns: of whole groups, and of a narrower last one. None when
/// there are too many states.
class GroupCodebooks {
 public:
  GroupCodebooks(NmPattern nm, int levels, int64_t cols);
  /// Of a group with `width` columns; null when its states are not enumerated.
  const GroupCodebook* find(int width) const;

 private:
  std::vector<GroupCodebook> books_;
  std::vector<int> width_;
};

/// `kTileRows` rows of a group, in lanes.
inline constexpr int kTileRows = 64;

/// The codebook with the level values and the metric of one group of columns folded in.
struct GroupTable {
  const GroupCodebook* codebook = nullptr;
  std::vector<float> coefficient;  ///< (states, kept): signed level value
  std::vector<float> half_energy;  ///< (states): v^T A v / 2

  /// metric: (width, width) row-major.
  GroupTable(const GroupCodebook& codebook, std::span<const float> level_values, const double* metric,
             int width);
};

/// For each lane the state with the smallest cost; `symbols[c][lane]` gets its content (0 = pruned), the sign
/// included. target: b, (width)[kTileRows]; scale: a > 0, [kTileRows]. First smallest wins, so results do not
/// depend on the vector width.
void best_codes(const GroupTable& table, const float (*target)[kTileRows], const float* scale, int width,
                int8_t (*symbols)[kTileRows]);

/// values[c][lane] = what a symbol stands for: 0 or +-level value, times the lane's scale.
void dequantize(const int8_t (*symbols)[kTileRows], std::span<const float> level_values, const float* scale,
                int width, float (*values)[kTileRows]);

/// For codebooks too large to enumerate: starting from `symbols` (all zero: the N largest |b_c| /
/// sqrt(A_cc)), changes one symbol or moves one kept position at a time while the cost falls. metric: (width,
/// width).
void improve_codes_locally(NmPattern nm, std::span<const float> level_values, const double* metric,
                           const float (*target)[kTileRows], const float* scale, int width, int lanes,
                           int8_t (*symbols)[kTileRows]);

}  // namespace stbllm
