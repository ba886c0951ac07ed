#include "stbllm/quantize/group_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/quantize/lanes.h"

namespace stbllm {
namespace {

int64_t pair_count(int width, int kept, int levels) {
  int64_t states = binomial(width, kept);
  for (int k = 0; k < kept; ++k) states *= 2 * levels;
  return states / 2;
}

}  // namespace

bool GroupCodebook::enumerable(NmPattern nm, int levels) {
  double states = static_cast<double>(binomial(nm.group, nm.keep)) * std::pow(2.0 * levels, nm.keep) / 2;
  return states <= static_cast<double>(kMaxEnumeratedStates);
}

GroupCodebook::GroupCodebook(NmPattern nm, int levels, int width) : kept_(std::min(nm.keep, width)) {
  const int64_t total = pair_count(width, kept_, levels);
  STBLLM_CHECK(total <= kMaxEnumeratedStates, "{} states of {} with {} levels", total, nm.str(), levels);
  position_.reserve(total * kept_);
  symbol_.reserve(total * kept_);
  int64_t symbol_states = 1;  // of one support
  for (int k = 0; k < kept_; ++k) symbol_states *= 2 * levels;
  for (unsigned support = 0; support < 1u << width; ++support) {
    if (std::popcount(support) != kept_) continue;
    for (int64_t state = 0; state < symbol_states / 2; ++state) {  // the last symbol's sign bit is the top half
      int64_t rest = state;
      int position = -1;
      for (int k = 0; k < kept_; ++k) {
        do ++position;
        while (!(support >> position & 1u));
        const bool last = k == kept_ - 1;
        const int digit = last ? static_cast<int>(rest) : static_cast<int>(rest % (2 * levels));
        rest /= 2 * levels;
        const int level = digit % levels;
        const bool negative = !last && digit >= levels;
        position_.push_back(static_cast<uint8_t>(position));
        symbol_.push_back(static_cast<int8_t>(negative ? -1 - level : 1 + level));
      }
    }
  }
}

GroupTable::GroupTable(const GroupCodebook& book, std::span<const float> level_values, const double* metric, int width)
    : codebook(&book) {
  const int kept = book.kept();
  coefficient.resize(book.states() * kept);
  energy.resize(book.states());
  for (int64_t state = 0; state < book.states(); ++state) {
    const uint8_t* position = book.positions(state);
    const int8_t* symbol = book.symbols(state);
    std::array<double, 16> value;
    for (int k = 0; k < kept; ++k) {
      value[k] = std::copysign(static_cast<double>(level_values[std::abs(symbol[k]) - 1]), symbol[k]);
      coefficient[state * kept + k] = static_cast<float>(value[k]);
    }
    double sum = 0;
    for (int k = 0; k < kept; ++k) {
      double row = 0;
      for (int l = 0; l < kept; ++l) row += metric[position[k] * width + position[l]] * value[l];
      sum += value[k] * row;
    }
    energy[state] = static_cast<float>(sum);
  }
}

namespace {

/// The loop over all states, for a fixed number of kept weights so that it unrolls.
template <int kKept>
STBLLM_INLINE void scan_states(const GroupTable& table, const float (*target)[kTileRows], const float* scale, float* best_cost,
                               float* best_sign, int32_t* best_state) {
  const int64_t states = table.codebook->states();
  for (int first = 0; first < kTileRows; first += kLanes) {
    float cost_min[kLanes], sign_min[kLanes], a[kLanes];
    int32_t state_min[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      cost_min[lane] = std::numeric_limits<float>::infinity();
      sign_min[lane] = 1;
      state_min[lane] = 0;
      a[lane] = scale[first + lane];
    }
    for (int64_t state = 0; state < states; ++state) {
      const uint8_t* position = table.codebook->positions(state);
      const float* coefficient = &table.coefficient[state * kKept];
      const float energy = table.energy[state];
      float dot[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) dot[lane] = coefficient[0] * target[position[0]][first + lane];
      for (int k = 1; k < kKept; ++k)
        for (int lane = 0; lane < kLanes; ++lane) dot[lane] += coefficient[k] * target[position[k]][first + lane];
      for (int lane = 0; lane < kLanes; ++lane) {
        const float cost = a[lane] * (a[lane] * energy - 2 * std::fabs(dot[lane]));
        const bool better = cost < cost_min[lane];
        cost_min[lane] = better ? cost : cost_min[lane];
        sign_min[lane] = better ? dot[lane] : sign_min[lane];
        state_min[lane] = better ? static_cast<int32_t>(state) : state_min[lane];
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      best_cost[first + lane] = cost_min[lane];
      best_sign[first + lane] = sign_min[lane];
      best_state[first + lane] = state_min[lane];
    }
  }
}

#define STBLLM_SCAN(kept)                                                                                                       \
  STBLLM_CLONES void scan_##kept(const GroupTable& table, const float (*target)[kTileRows], const float* scale, float* best_cost, \
                                 float* best_sign, int32_t* best_state) {                                                       \
    scan_states<kept>(table, target, scale, best_cost, best_sign, best_state);                                                  \
  }
STBLLM_SCAN(1)
STBLLM_SCAN(2)
STBLLM_SCAN(3)
STBLLM_SCAN(4)
STBLLM_SCAN(5)
STBLLM_SCAN(6)
STBLLM_SCAN(7)
STBLLM_SCAN(8)
#undef STBLLM_SCAN

}  // namespace

void best_codes(const GroupTable& table, const float (*target)[kTileRows], const float* scale, int width,
                int8_t (*symbols)[kTileRows]) {
  alignas(64) float cost[kTileRows], sign[kTileRows];
  alignas(64) int32_t state[kTileRows];
  using Scan = void (*)(const GroupTable&, const float (*)[kTileRows], const float*, float*, float*, int32_t*);
  static constexpr Scan kScan[] = {nullptr, scan_1, scan_2, scan_3, scan_4, scan_5, scan_6, scan_7, scan_8};
  const int kept = table.codebook->kept();
  STBLLM_CHECK(kept <= 8, "{} kept weights in an enumerated group", kept);
  kScan[kept](table, target, scale, cost, sign, state);
  for (int c = 0; c < width; ++c) std::fill_n(symbols[c], kTileRows, int8_t{0});
  for (int lane = 0; lane < kTileRows; ++lane) {
    const uint8_t* position = table.codebook->positions(state[lane]);
    const int8_t* symbol = table.codebook->symbols(state[lane]);
    for (int k = 0; k < kept; ++k) symbols[position[k]][lane] = sign[lane] < 0 ? static_cast<int8_t>(-symbol[k]) : symbol[k];
  }
}

void improve_codes_locally(NmPattern nm, std::span<const float> level_values, const double* metric,
                           const float (*target)[kTileRows], const float* scale, int width, int lanes,
                           int8_t (*symbols)[kTileRows]) {
  const int levels = static_cast<int>(level_values.size());
  const int kept = std::min(nm.keep, width);
  const auto value_of = [&](int symbol) {
    return symbol == 0 ? 0.0 : std::copysign(static_cast<double>(level_values[std::abs(symbol) - 1]), symbol);
  };
  for (int lane = 0; lane < lanes; ++lane) {
    const double a = scale[lane];
    std::array<double, 16> b, value{}, product{};  // product = A v
    std::array<int, 16> symbol{};
    int present = 0;
    for (int c = 0; c < width; ++c) {
      b[c] = target[c][lane];
      symbol[c] = symbols[c][lane];
      present += symbol[c] != 0;
    }
    if (present != kept) {
      std::array<int, 16> order;
      for (int c = 0; c < width; ++c) order[c] = c;
      const auto gain = [&](int c) { return std::abs(b[c]) / std::sqrt(std::max(metric[c * width + c], 1e-30)); };
      std::stable_sort(order.begin(), order.begin() + width, [&](int x, int y) { return gain(x) > gain(y); });
      for (int c = 0; c < width; ++c) symbol[c] = 0;
      for (int k = 0; k < kept; ++k) {
        const int c = order[k];
        const double wanted = std::abs(b[c]) / std::max(metric[c * width + c] * a, 1e-30);
        int level = 0;
        for (int l = 1; l < levels; ++l)
          if (std::abs(level_values[l] - wanted) < std::abs(level_values[level] - wanted)) level = l;
        symbol[c] = b[c] < 0 ? -1 - level : 1 + level;
      }
    }
    for (int c = 0; c < width; ++c) value[c] = value_of(symbol[c]);
    for (int c = 0; c < width; ++c)
      for (int d = 0; d < width; ++d) product[c] += metric[c * width + d] * value[d];
    // f(v) = a^2 v'Av - 2 a v'b; changing v_i by x and v_j by y changes f by the expression below.
    for (int pass = 0; pass < 8 * width; ++pass) {
      double best = -1e-9 * a * a;
      int best_from = -1, best_to = -1, best_symbol = 0;
      for (int from = 0; from < width; ++from) {
        if (symbol[from] == 0) continue;
        for (int to = 0; to < width; ++to) {
          if (to != from && symbol[to] != 0) continue;
          for (int s = -levels; s <= levels; ++s) {
            if (s == 0) continue;
            const double y = value_of(s), x = -value[from];
            double change;
            if (to == from) {
              const double step = y - value[from];
              change = a * a * (2 * step * product[from] + step * step * metric[from * width + from]) - 2 * a * step * b[from];
            } else {
              change = a * a * (2 * x * product[from] + 2 * y * product[to] + x * x * metric[from * width + from] +
                                y * y * metric[to * width + to] + 2 * x * y * metric[from * width + to]) -
                       2 * a * (x * b[from] + y * b[to]);
            }
            if (change < best) best = change, best_from = from, best_to = to, best_symbol = s;
          }
        }
      }
      if (best_from < 0) break;
      const auto set = [&](int c, int s) {
        const double step = value_of(s) - value[c];
        for (int d = 0; d < width; ++d) product[d] += metric[d * width + c] * step;
        value[c] += step;
        symbol[c] = s;
      };
      if (best_to != best_from) set(best_from, 0);
      set(best_to, best_symbol);
    }
    for (int c = 0; c < width; ++c) symbols[c][lane] = static_cast<int8_t>(symbol[c]);
  }
}

}  // namespace stbllm
