#include "stbllm/quantize/group_search.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "stbllm/base/bits.h"
#include "stbllm/base/error.h"
#include "stbllm/base/lanes.h"

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

GroupCodebook::GroupCodebook(NmPattern nm, int levels, int width)
    : kept_(std::min(nm.keep, width)), words_(ceil_div(width, 4)) {
  const int64_t total = pair_count(width, kept_, levels);
  STBLLM_CHECK(total <= kMaxEnumeratedStates, "{} states of {} with {} levels", total, nm.str(), levels);
  position_.reserve(total * kept_);
  symbol_.reserve(total * kept_);
  int64_t symbol_states = 1;  // of one support
  for (int k = 0; k < kept_; ++k) symbol_states *= 2 * levels;
  for (unsigned support = 0; support < 1u << width; ++support) {
    if (std::popcount(support) != kept_) continue;
    for (int64_t state = 0; state < symbol_states / 2;
         ++state) {  // the last symbol's sign bit is the top half
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
  packed_.assign(total * words_, 0);
  for (int64_t state = 0; state < total; ++state)
    for (int k = 0; k < kept_; ++k)
      packed_[state * words_ + positions(state)[k] / 4] |= uint32_t{static_cast<uint8_t>(symbols(state)[k])}
                                                           << positions(state)[k] % 4 * 8;
}

GroupCodebooks::GroupCodebooks(NmPattern nm, int levels, int64_t cols) {
  if (!GroupCodebook::enumerable(nm, levels)) return;
  for (const int width : {nm.group, static_cast<int>(cols % nm.group)}) {
    if (width == 0) continue;
    books_.emplace_back(nm, levels, width);
    width_.push_back(width);
  }
}

const GroupCodebook* GroupCodebooks::find(int width) const {
  for (size_t i = 0; i < books_.size(); ++i)
    if (width_[i] == width) return &books_[i];
  return nullptr;
}

GroupTable::GroupTable(const GroupCodebook& book, std::span<const float> level_values, const double* metric,
                       int width)
    : codebook(&book) {
  const int kept = book.kept();
  coefficient.resize(book.states() * kept);
  half_energy.resize(book.states());
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
    half_energy[state] = static_cast<float>(sum / 2);
  }
}

namespace {

/// The loop over all states, for a fixed number of kept weights so that it unrolls; two vectors of rows share
/// what is read for a state. negated: -1 where the negative of the state is meant, else 0.
template <typename Lanes, int kKept>
STBLLM_INLINE void scan_states(const GroupTable& table, const float (*target)[kTileRows], const float* scale,
                               int32_t* best_state, int32_t* negated) {
  const auto states = static_cast<int32_t>(table.codebook->states());
  const uint8_t* positions = table.codebook->positions(0);
  const float *coefficients = table.coefficient.data(), *half_energy = table.half_energy.data();
  for (int first = 0; first < kTileRows; first += 2 * kLanes) {
    const Lanes a[] = {load_lanes<Lanes>(scale + first), load_lanes<Lanes>(scale + first + kLanes)};
    Lanes cost_min[] = {std::numeric_limits<float>::infinity() + Lanes{},
                        std::numeric_limits<float>::infinity() + Lanes{}};
    Lanes dot_min[] = {{}, {}};
    IntLanes<Lanes> state_min[] = {{}, {}};
    for (int32_t state = 0; state < states; ++state) {
      for (int half = 0; half < 2; ++half) {
        Lanes dot = {};
        for (int k = 0; k < kKept; ++k)
          dot += coefficients[state * kKept + k] *
                 load_lanes<Lanes>(&target[positions[state * kKept + k]][first + half * kLanes]);
        const Lanes cost =
            a[half] * half_energy[state] - magnitude_of(dot);  // over 2 a, which is the same for all states
        const IntLanes<Lanes> better = cost < cost_min[half];
        cost_min[half] = select(better, cost, cost_min[half]);
        dot_min[half] = select(better, dot, dot_min[half]);
        state_min[half] = select(better, state + IntLanes<Lanes>{}, state_min[half]);
      }
    }
    const IntLanes<Lanes> below_zero[] = {dot_min[0] < 0.f, dot_min[1] < 0.f};
    std::memcpy(best_state + first, state_min, sizeof(state_min));
    std::memcpy(negated + first, below_zero, sizeof(below_zero));
  }
}

template <int kKept>
void scan(const GroupTable& table, const float (*target)[kTileRows], const float* scale, int32_t* best_state,
          int32_t* negated) {
  with_lanes([&]<typename Lanes>()
                 STBLLM_INLINED { scan_states<Lanes, kKept>(table, target, scale, best_state, negated); });
}

/// symbols[c][lane] = those of the lane's state, or of its negative.
template <typename Lanes>
STBLLM_INLINE void spread_symbols_of(const GroupCodebook& codebook, const int32_t* state,
                                     const int32_t* negated, int width, int8_t (*symbols)[kTileRows]) {
  for (int word = 0; word < codebook.words(); ++word)
    for (int first = 0; first < kTileRows; first += kLanes) {
      int32_t words[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        words[lane] =
            static_cast<int32_t>(codebook.packed()[int64_t{state[first + lane]} * codebook.words() + word]);
      const auto four = load_vector<IntLanes<Lanes>>(words),
                 sign = load_vector<IntLanes<Lanes>>(negated + first);
      for (int c = 4 * word; c < std::min(4 * word + 4, width); ++c)
        store_byte_lanes(symbols[c] + first, (signed_bytes_of(four, c % 4) ^ sign) - sign);
    }
}
void spread_symbols(const GroupCodebook& codebook, const int32_t* state, const int32_t* negated, int width,
                    int8_t (*symbols)[kTileRows]) {
  with_lanes([&]<typename Lanes>()
                 STBLLM_INLINED { spread_symbols_of<Lanes>(codebook, state, negated, width, symbols); });
}

template <typename Lanes>
STBLLM_INLINE void dequantize_column_of(const int8_t* symbols, const float* level, const float* scale,
                                        float* values) {
  for (int first = 0; first < kTileRows; first += kLanes) {
    const IntLanes<Lanes> symbol = load_byte_lanes<Lanes>(symbols + first),
                          index = select(symbol < 0, -symbol, symbol);
    const Lanes zero = {};
    Lanes value = select(index == 1, zero + level[0], zero);
    value = select(index == 2, zero + level[1], value);
    value = select(index == 3, zero + level[2], value);
    store_lanes(values + first,
                with_signs_of(load_lanes<Lanes>(scale + first) * value, bits_as<float>(symbol)));
  }
}
void dequantize_column(const int8_t* symbols, const float* level, const float* scale, float* values) {
  with_lanes([&]<typename Lanes>()
                 STBLLM_INLINED { dequantize_column_of<Lanes>(symbols, level, scale, values); });
}

}  // namespace

void best_codes(const GroupTable& table, const float (*target)[kTileRows], const float* scale, int width,
                int8_t (*symbols)[kTileRows]) {
  alignas(64) int32_t state[kTileRows], negated[kTileRows];
  using Scan = void (*)(const GroupTable&, const float(*)[kTileRows], const float*, int32_t*, int32_t*);
  static constexpr Scan kScan[] = {nullptr, scan<1>, scan<2>, scan<3>, scan<4>,
                                   scan<5>, scan<6>, scan<7>, scan<8>};
  const int kept = table.codebook->kept();
  STBLLM_CHECK(kept <= 8, "{} kept weights in an enumerated group", kept);
  kScan[kept](table, target, scale, state, negated);
  spread_symbols(*table.codebook, state, negated, width, symbols);
}

void dequantize(const int8_t (*symbols)[kTileRows], std::span<const float> level_values, const float* scale,
                int width, float (*values)[kTileRows]) {
  STBLLM_CHECK(level_values.size() <= 3, "{} levels", level_values.size());
  std::array<float, 3> level{};
  std::copy(level_values.begin(), level_values.end(), level.begin());
  for (int c = 0; c < width; ++c) dequantize_column(symbols[c], level.data(), scale, values[c]);
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
      const auto gain = [&](int c) {
        return std::abs(b[c]) / std::sqrt(std::max(metric[c * width + c], 1e-30));
      };
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
              change = a * a * (2 * step * product[from] + step * step * metric[from * width + from]) -
                       2 * a * step * b[from];
            } else {
              change =
                  a * a *
                      (2 * x * product[from] + 2 * y * product[to] + x * x * metric[from * width + from] +
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
