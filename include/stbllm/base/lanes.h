#pragma once
// Sixteen numbers side by side, from which the compiler makes vector code for each instruction set. All
// functions are always inlined, so that files compiled for different machines may share them. The quantizer
// works on this many rows in lockstep, so that no result depends on how rows are split over threads.
//
// Sixteen floats take one register with AVX-512, two with AVX2, and four with SSE and NEON. g++ keeps a
// vector that is wider than a register in memory and copies it piece by piece, which takes several times as
// long as the arithmetic; so such a vector is a pair of halves here (Halves), and code that works on lanes is
// a template over the type of sixteen floats, `Lanes`. with_lanes() chooses it at run time, NativeLanes is
// that of the instructions that a file is compiled for.

#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace stbllm {

inline constexpr int kLanes = 16;

#define STBLLM_INLINE inline __attribute__((always_inline))

/// Two vectors that are one.
template <typename Half>
struct Halves {
  Half low, high;
};

namespace lanes_detail {
template <typename T, int N, int Registers>
struct VectorOf {
  using Type = Halves<typename VectorOf<T, N / 2, Registers / 2>::Type>;
};
template <typename T, int N>
struct VectorOf<T, N, 1> {
  using Type __attribute__((vector_size(N * sizeof(T)))) = T;
};

template <typename Vector>
constexpr int kRegisters = 1;
template <typename Half>
constexpr int kRegisters<Halves<Half>> = 2 * kRegisters<Half>;

template <typename Vector>
constexpr bool kIsHalves = false;
template <typename Half>
constexpr bool kIsHalves<Halves<Half>> = true;
template <typename Vector>
concept IsHalves = kIsHalves<Vector>;
}  // namespace lanes_detail

/// kLanes numbers of type T, in as many registers as the floats of `Lanes`. A comparison of two vectors gives
/// IntLanes, -1 in each lane where it holds, and 0 in the others.
template <typename Lanes, typename T>
using LanesOf = typename lanes_detail::VectorOf<T, kLanes, lanes_detail::kRegisters<Lanes>>::Type;
template <typename Lanes>
using IntLanes = LanesOf<Lanes, int32_t>;
/// 16-bit words, which hold bfloat16 numbers or four nibbles each.
template <typename Lanes>
using WordLanes = LanesOf<Lanes, uint16_t>;

/// kLanes floats in so many registers.
template <int Registers>
using LanesIn = typename lanes_detail::VectorOf<float, kLanes, Registers>::Type;
#if defined(__AVX512F__)
using NativeLanes = LanesIn<1>;
#elif defined(__AVX2__)
using NativeLanes = LanesIn<2>;
#else
using NativeLanes = LanesIn<4>;
#endif

// --- arithmetic of halves, like that of vectors, also with a number in place of either ---

#define STBLLM_OPERATOR(op)                                                                  \
  template <typename H>                                                                      \
  STBLLM_INLINE auto operator op(const Halves<H>& a, const Halves<H>& b) {                   \
    return Halves<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high};               \
  }                                                                                          \
  template <typename H, typename S>                                                          \
  requires std::is_arithmetic_v<S> STBLLM_INLINE auto operator op(const Halves<H>& a, S b) { \
    return Halves<decltype(a.low op b)>{a.low op b, a.high op b};                            \
  }                                                                                          \
  template <typename H, typename S>                                                          \
  requires std::is_arithmetic_v<S> STBLLM_INLINE auto operator op(S a, const Halves<H>& b) { \
    return Halves<decltype(a op b.low)>{a op b.low, a op b.high};                            \
  }
STBLLM_OPERATOR(+)
STBLLM_OPERATOR(-)
STBLLM_OPERATOR(*)
STBLLM_OPERATOR(/)
STBLLM_OPERATOR(&)
STBLLM_OPERATOR(|)
STBLLM_OPERATOR(^)
STBLLM_OPERATOR(<<)
STBLLM_OPERATOR(>>)
STBLLM_OPERATOR(<)
STBLLM_OPERATOR(>)
STBLLM_OPERATOR(<=)
STBLLM_OPERATOR(>=)
STBLLM_OPERATOR(==)
STBLLM_OPERATOR(!=)
#undef STBLLM_OPERATOR
template <typename H>
STBLLM_INLINE Halves<H> operator-(const Halves<H>& a) {
  return {-a.low, -a.high};
}
template <typename H, typename B>
STBLLM_INLINE Halves<H>& operator+=(Halves<H>& a, const B& b) {
  return a = a + b;
}
template <typename H, typename B>
STBLLM_INLINE Halves<H>& operator-=(Halves<H>& a, const B& b) {
  return a = a - b;
}

/// a where the mask holds, else b.
template <typename Mask, typename Vector>
STBLLM_INLINE Vector select(const Mask& mask, const Vector& a, const Vector& b) {
  if constexpr (lanes_detail::IsHalves<Vector>)
    return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
  else
    return mask ? a : b;
}

/// Every number as the nearest of type T towards zero.
template <typename T, typename Vector>
STBLLM_INLINE auto converted(const Vector& x) {
  if constexpr (lanes_detail::IsHalves<Vector>) {
    return Halves<decltype(converted<T>(x.low))>{converted<T>(x.low), converted<T>(x.high)};
  } else {
    constexpr int kCount = sizeof(Vector) / sizeof(x[0]);
    return __builtin_convertvector(x, typename lanes_detail::VectorOf<T, kCount, 1>::Type);
  }
}

/// The same bits as numbers of another type.
template <typename T, typename Vector>
STBLLM_INLINE auto bits_as(const Vector& x) {
  if constexpr (lanes_detail::IsHalves<Vector>) {
    return Halves<decltype(bits_as<T>(x.low))>{bits_as<T>(x.low), bits_as<T>(x.high)};
  } else {
    return (typename lanes_detail::VectorOf<T, sizeof(Vector) / sizeof(T), 1>::Type) x;
  }
}

// --- memory ---

/// The first `count` numbers at `from`, then zeros.
template <typename Vector, typename T>
STBLLM_INLINE Vector load_vector(const T* from, int count = kLanes) {
  Vector x = {};
  if constexpr (lanes_detail::IsHalves<Vector>) {
    constexpr int kHalf = sizeof(x.low) / sizeof(T);
    x.low = load_vector<decltype(x.low)>(from, count < kHalf ? count : kHalf);
    if (count > kHalf) x.high = load_vector<decltype(x.high)>(from + kHalf, count - kHalf);
  } else {
    std::memcpy(&x, from, sizeof(T) * static_cast<size_t>(count));
  }
  return x;
}
/// Writes the first `count` numbers.
template <typename Vector, typename T>
STBLLM_INLINE void store_vector(T* to, const Vector& x, int count = kLanes) {
  if constexpr (lanes_detail::IsHalves<Vector>) {
    constexpr int kHalf = sizeof(x.low) / sizeof(T);
    store_vector(to, x.low, count < kHalf ? count : kHalf);
    if (count > kHalf) store_vector(to + kHalf, x.high, count - kHalf);
  } else {
    std::memcpy(to, &x, sizeof(T) * static_cast<size_t>(count));
  }
}

template <typename Lanes>
STBLLM_INLINE Lanes load_lanes(const float* from, int count = kLanes) {
  return load_vector<Lanes>(from, count);
}
template <typename Lanes>
STBLLM_INLINE void store_lanes(float* to, const Lanes& x, int count = kLanes) {
  store_vector(to, x, count);
}
/// Calls visit(first, count) for all indices from `begin` to `end`: kLanes at a time, a count that the
/// compiler sees as a constant, then once for the rest.
template <typename Visit>
STBLLM_INLINE void for_each_lanes(int64_t begin, int64_t end, const Visit& visit) {
  for (; begin + kLanes <= end; begin += kLanes) visit(begin, kLanes);
  if (begin < end) visit(begin, static_cast<int>(end - begin));
}

/// Sixteen signed bytes. They become 16-bit numbers first, because g++ 12 takes lanes one by one where their
/// size grows fourfold at once.
template <typename Lanes>
STBLLM_INLINE IntLanes<Lanes> load_byte_lanes(const int8_t* from) {
  return converted<int32_t>(converted<int16_t>(load_vector<LanesOf<Lanes, int8_t>>(from)));
}
/// Writes the lowest byte of each of IntLanes.
template <typename Ints>
STBLLM_INLINE void store_byte_lanes(int8_t* to, const Ints& x) {
  store_vector(to, converted<int8_t>(converted<int16_t>(x)));
}

/// The first `count` bfloat16 numbers at `from`, then zeros.
template <typename Lanes>
STBLLM_INLINE Lanes load_bfloat16_lanes(const uint16_t* from, int count = kLanes) {
  return bits_as<float>(converted<int32_t>(load_vector<WordLanes<Lanes>>(from, count)) << 16);
}
/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
template <typename Lanes>
STBLLM_INLINE Lanes round_to_bfloat16(const Lanes& x) {
  const IntLanes<Lanes> bits = bits_as<int32_t>(x), up = (bits + 0x7fff + (bits >> 16 & 1)) & ~0xffff,
                        nan = bits | 0x400000;
  return bits_as<float>(select(x == x, up, nan));
}
/// Writes the first `count` of numbers that are bfloat16 numbers already.
template <typename Lanes>
STBLLM_INLINE void store_bfloat16_lanes(uint16_t* to, const Lanes& rounded, int count = kLanes) {
  store_vector(to, converted<uint16_t>(bits_as<int32_t>(rounded) >> 16 & 0xffff), count);
}
/// The first `count` signed 16-bit numbers at `from`, then zeros.
template <typename Lanes>
STBLLM_INLINE IntLanes<Lanes> load_short_lanes(const int16_t* from, int count = kLanes) {
  return converted<int32_t>(load_vector<LanesOf<Lanes, int16_t>>(from, count));
}
/// Writes the lower half of the first `count` of IntLanes.
template <typename Ints>
STBLLM_INLINE void store_short_lanes(int16_t* to, const Ints& x, int count = kLanes) {
  store_vector(to, converted<int16_t>(x), count);
}

// --- functions of lanes ---

/// Nibble k of each of WordLanes: its four bits from bit 4 * k on, as IntLanes.
template <typename Words>
STBLLM_INLINE auto nibbles_of(const Words& words, int k) {
  return converted<int32_t>(words) >> 4 * k & 15;
}
/// Byte k of each of IntLanes, as a signed number.
template <typename Ints>
STBLLM_INLINE Ints signed_bytes_of(const Ints& x, int k) {
  return x << (24 - 8 * k) >> 24;
}

/// For each lane the lane that its number comes from.
using LaneIndex = std::array<int32_t, kLanes>;

namespace lanes_detail {
/// The lanes from `First` on of what Index makes of both halves, or of one vector given twice.
template <LaneIndex Index, int First, typename Vector>
STBLLM_INLINE Vector picked(const Vector& low, const Vector& high) {
  constexpr int kCount = sizeof(Vector) / sizeof(float);
#if defined(__clang__)
  Vector y;
  for (int j = 0; j < kCount; ++j)
    y[j] = Index[First + j] < kCount ? low[Index[First + j]] : high[Index[First + j] - kCount];
  return y;
#else
  using Pick = typename VectorOf<int32_t, kCount, 1>::Type;
  Pick pick;
  std::memcpy(&pick, Index.data() + First, sizeof pick);
  return __builtin_shuffle(low, high, pick);
#endif
}
}  // namespace lanes_detail

template <LaneIndex Index, typename Lanes>
STBLLM_INLINE Lanes shuffle(const Lanes& x) {
  if constexpr (lanes_detail::kRegisters<Lanes> == 1) {
    return lanes_detail::picked<Index, 0>(x, x);
  } else if constexpr (lanes_detail::kRegisters<Lanes> == 2) {
    return {lanes_detail::picked<Index, 0>(x.low, x.high),
            lanes_detail::picked<Index, kLanes / 2>(x.low, x.high)};
  } else {
    float from[kLanes], to[kLanes];
    store_lanes(from, x);
    for (int j = 0; j < kLanes; ++j) to[j] = from[Index[static_cast<size_t>(j)]];
    return load_lanes<Lanes>(to);
  }
}
/// The sum of all lanes, added as a tree: halves, quarters, pairs, neighbours.
template <typename Vector>
STBLLM_INLINE float sum_of(const Vector& x) {
  if constexpr (lanes_detail::IsHalves<Vector>) {
    return sum_of(x.low + x.high);
  } else if constexpr (sizeof(Vector) == sizeof(float[2])) {
    return x[0] + x[1];
  } else {
    typename lanes_detail::VectorOf<float, sizeof(Vector) / sizeof(float[2]), 1>::Type half[2];
    std::memcpy(half, &x, sizeof x);
    return sum_of(half[0] + half[1]);
  }
}
/// The largest of all lanes, none of which may be NaN.
template <typename Lanes>
STBLLM_INLINE float largest_of(const Lanes& x) {
  float values[kLanes];
  store_lanes(values, x);
  float largest = values[0];
  for (const float value : values) largest = value > largest ? value : largest;
  return largest;
}
/// e^x within three units in the last place; 0 below -87, infinity above 88.3. NaN stays NaN.
template <typename Lanes>
STBLLM_INLINE Lanes exp_of(const Lanes& x) {
  // With x = n ln 2 + r and |r| <= ln 2 / 2, e^x is 2^n times a series of r. ln 2 is subtracted in two parts,
  // the first of so few bits that n times it is exact.
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the rounded number in the lowest bits
  const Lanes zero = {}, bounded_below = select(x < -88.f, zero - 88.f, x);
  const Lanes shifted = bounded_below * 1.44269504f + kRound, n = shifted - kRound;
  const Lanes r = bounded_below - n * 0.693359375f + n * 2.12194440e-4f;
  const Lanes series =
      1.f + r + r * r * (0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720)))));
  constexpr int kBitsOfRound = 0x4b400000;
  const IntLanes<Lanes> exponent = (bits_as<int32_t>(shifted) - kBitsOfRound + 127) << 23;
  const Lanes result = series * bits_as<float>(exponent);
  return select(x < -87.f, zero, select(x > 88.3f, zero + __builtin_inff(), result));
}
/// The square root of each number, rounded as IEEE asks.
template <typename Vector>
STBLLM_INLINE Vector sqrt_of(const Vector& x) {
  if constexpr (lanes_detail::IsHalves<Vector>) {
    return {sqrt_of(x.low), sqrt_of(x.high)};
  } else {
    float values[sizeof x / sizeof(float)];
    std::memcpy(values, &x, sizeof x);
    for (float& value : values) value = __builtin_sqrtf(value);
    Vector roots;
    std::memcpy(&roots, values, sizeof x);
    return roots;
  }
}
/// The magnitude of each number.
template <typename Lanes>
STBLLM_INLINE Lanes magnitude_of(const Lanes& x) {
  return bits_as<float>(bits_as<int32_t>(x) & 0x7fffffff);
}
/// The magnitudes with the signs of another vector.
template <typename Lanes>
STBLLM_INLINE Lanes with_signs_of(const Lanes& magnitude, const Lanes& signs) {
  return bits_as<float>(bits_as<int32_t>(magnitude) | (bits_as<int32_t>(signs) & INT32_MIN));
}
/// x where the mask holds, else 0.
template <typename Lanes>
STBLLM_INLINE Lanes masked(const Lanes& x, const IntLanes<Lanes>& mask) {
  return bits_as<float>(bits_as<int32_t>(x) & mask);
}

// --- the instruction set at run time ---

/// Compiles a function of plain loops for AVX-512, AVX2 and the baseline; the loader picks one. With clang,
/// and with address sanitizing, there is the baseline only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define STBLLM_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define STBLLM_CHOOSES_LANES 1
#else
#define STBLLM_CLONES
#define STBLLM_CHOOSES_LANES 0
#endif

namespace lanes_detail {
#if STBLLM_CHOOSES_LANES
template <typename Body>
__attribute__((target("arch=x86-64-v4"))) auto run_in_one(const Body& body) {
  return body.template operator()<LanesIn<1>>();
}
template <typename Body>
__attribute__((target("arch=x86-64-v3"))) auto run_in_two(const Body& body) {
  return body.template operator()<LanesIn<2>>();
}
/// Registers that kLanes floats take on this machine.
inline int registers_here() {
  static const int registers = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v3 && v4 ? 1 : v3 ? 2 : 4;
  }();
  return registers;
}
#endif
}  // namespace lanes_detail

/// Calls body.operator()<Lanes>() compiled for AVX-512, AVX2 or the baseline, whichever is the best that this
/// machine has. `body` is a lambda that is always inlined: [&]<typename Lanes>() STBLLM_INLINED { ... }
#define STBLLM_INLINED __attribute__((always_inline))
template <typename Body>
STBLLM_INLINE auto with_lanes(const Body& body) {
#if STBLLM_CHOOSES_LANES
  switch (lanes_detail::registers_here()) {
    case 1:
      return lanes_detail::run_in_one(body);
    case 2:
      return lanes_detail::run_in_two(body);
    default:
      break;
  }
#endif
  return body.template operator()<NativeLanes>();
}

}  // namespace stbllm
