// Vectors, stored numbers and the two products that attention is made of; see cpp_block_sparse.cpp.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace {

// Registers that hold sums, by vectors of queries side by side; the rest holds one query vector each and a broadcast.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kWide = 4;
constexpr int rows_at_once(int c) { return c >= 3 ? 6 : 8; }
#else
constexpr int kWide = 2;
constexpr int rows_at_once(int c) { return c == 2 ? 4 : 8; }
#endif
constexpr int kPanel = 64;      // queries whose logits are held at a time; the bits of a mask word
constexpr int kPanels = 2;      // panels of an item: they share what is read of keys and values
constexpr int kKeys = 128;      // keys of a chunk, between two updates of the output
constexpr int kSlack = 8;       // rows that the last group of keys may write beyond a chunk

// ------------------------------------------------------------------ vectors

template <class Real>
struct Vec;
template <>
struct Vec<float> {
  typedef float V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int n = VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef double V __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int n = VECTOR_BYTES / 8;
};
template <class Real>
using V = typename Vec<Real>::V;
template <class Real>
using I = typename Vec<Real>::I;

template <class Real>
inline V<Real> load(const Real* from) {
  return *reinterpret_cast<const V<Real>*>(from);
}
template <class Real>
inline void store(Real* to, V<Real> x) {
  *reinterpret_cast<V<Real>*>(to) = x;
}
template <class Real>
inline V<Real> splat(Real x) {
  V<Real> all;
  for (int i = 0; i < Vec<Real>::n; ++i) all[i] = x;
  return all;
}

template <class Real>
inline V<Real> load_anywhere(const void* from) {
  V<Real> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// Lane i of vector j and lane j of vector i change places.
template <class Real, int S = 1>
inline void transpose(V<Real>* rows) {
  constexpr int n = Vec<Real>::n;
  I<Real> even, odd;
  for (int i = 0; i < n; ++i) even[i] = i & S ? n + i - S : i, odd[i] = i & S ? n + i : i + S;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if (!(i & S)) {
      V<Real> a = rows[i], b = rows[i + S];
#if defined(__clang__)
      for (int j = 0; j < n; ++j) rows[i][j] = even[j] < n ? a[even[j]] : b[even[j] - n];
      for (int j = 0; j < n; ++j) rows[i + S][j] = odd[j] < n ? a[odd[j]] : b[odd[j] - n];
#else
      rows[i] = __builtin_shuffle(a, b, even), rows[i + S] = __builtin_shuffle(a, b, odd);
#endif
    }
  if constexpr (2 * S < n) transpose<Real, 2 * S>(rows);
}

// 2 ** x for x that is not large; 0 below -126, where masked logits (-inf) are; NaN stays.
inline V<float> power_of_two(V<float> x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  const V<float> magic = splat<float>(12582912.0f);
  V<float> shifted = x + magic;
  V<float> f = x - (shifted - magic);
  // Least relative error on [-0.5, 0.5] at degree 5, the constant set to 1: 2 ** 0 is 1.
  V<float> p = splat<float>(1.327651221e-3f);
  p = p * f + splat<float>(9.675542164e-3f);
  p = p * f + splat<float>(5.550713105e-2f);
  p = p * f + splat<float>(2.402211971e-1f);
  p = p * f + splat<float>(6.931469672e-1f);
  p = p * f + splat<float>(1.0f);
  V<float> y = (V<float>)((I<float>)p + ((I<float>)shifted << 23));
  return x < splat<float>(-126.0f) ? splat<float>(0.0f) : y;
}
inline V<double> power_of_two(V<double> x) {
  for (int i = 0; i < Vec<double>::n; ++i) x[i] = std::exp2(x[i]);
  return x;
}

template <class Real>
inline V<Real> larger(V<Real> a, V<Real> b) {
  return a > b ? a : b;
}

// Lanes whose bit is clear become -inf.
template <class Real>
inline V<Real> masked(V<Real> x, uint64_t bits) {
  I<Real> lane;
  for (int i = 0; i < Vec<Real>::n; ++i) lane[i] = i;
  using Int = std::remove_reference_t<decltype(lane[0])>;
  I<Real> all;
  for (int i = 0; i < Vec<Real>::n; ++i) all[i] = static_cast<Int>(bits & ((1ull << Vec<Real>::n) - 1));
  return ((all >> lane) & 1) != 0 ? x : splat<Real>(-std::numeric_limits<Real>::infinity());
}

// ------------------------------------------------------------------ stored numbers

struct BFloat { uint16_t bits; };
struct Half { uint16_t bits; };

inline float widened(float x) { return x; }
inline double widened(double x) { return x; }
inline float widened(BFloat x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widened(Half x) {
  // Exponents differ by 112; the product gets numbers below the normal range right, too.
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 0x1p112f;
  std::memcpy(&bits, &y, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(double x, double* to) { *to = x; }
inline void narrow(float x, BFloat* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To nearest, ties to even; a NaN stays one.
  to->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Half* to) {
  uint32_t bits, small;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  // To nearest, ties to even: below the normal range an addition rounds, where a unit of 0.5 is the smallest half.
  float y;
  std::memcpy(&y, &size, 4);
  y += 0.5f;
  std::memcpy(&small, &y, 4);
  uint32_t half = size > 0x7f800000    ? 0x7e00
                  : size >= 0x47800000 ? 0x7c00
                  : size < 0x38800000  ? small - 0x3f000000
                                       : (size + 0xc8000fff + ((size >> 13) & 1)) >> 13;
  to->bits = static_cast<uint16_t>(sign | half);
}

template <class Stored, class Real>
inline void widen_row(const Stored* from, Real* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Stored, Half>)
    for (; i + 16 <= n; i += 16)
      _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<Stored, Half>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = widened(from[i]);
}

template <class Real, class Stored>
inline void narrow_row(const Real* from, Stored* to, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Stored, BFloat>)
    for (; i + 16 <= n; i += 16) {
      // As `narrow` does it.
      __m512 x = _mm512_loadu_ps(from + i);
      __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
      bits = _mm512_mask_mov_epi32(_mm512_srli_epi32(bits, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                   _mm512_set1_epi32(0x7fc0));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(bits));
    }
  if constexpr (std::is_same_v<Stored, Half>)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(__F16C__)
  if constexpr (std::is_same_v<Stored, Half>)
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) narrow(from[i], to + i);
}

// ------------------------------------------------------------------ products

// Elements multiplied one by one.
template <class Number>
struct Single {
  using Real = Number;
  using Element = Number;
  static constexpr int kStep = 1;
  static constexpr int kDims = kWide == 4 ? 6 : 4;  // value dims summed at once
  static inline V<Real> add(V<Real> sum, Element a, V<Real> b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Two bfloat16 at a time, summed in float32.
struct Pair {
  using Real = float;
  typedef uint32_t Element __attribute__((aligned(2), may_alias));
  static constexpr int kStep = 2;
  static constexpr int kDims = 4;
  static inline V<Real> add(V<Real> sum, uint32_t a, V<Real> b) {
    return (V<Real>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
  }
};
#endif

template <class Real>
struct Rule {
  Real factor;         // to logits in powers of two
  Real cap, cap_in;    // soft cap in powers of two, and what its tanh takes; 0 for none
};

template <class Real>
inline V<Real> logit(V<Real> product, const Rule<Real>& rule) {
  if (rule.cap == 0) return product * rule.factor;
  // tanh(y) = 1 - 2 / (1 + e^2y), which is 1 in this precision from y = 20 on.
  V<Real> y = product * rule.cap_in, limit = splat<Real>(60);
  y = y > limit ? limit : y;
  return rule.cap - 2 * rule.cap / (1 + power_of_two(y));
}

// Logits of keys first..end by C vectors of queries, and the largest of each query.
template <class Op, int C, class Real = typename Op::Real>
void logits(const typename Op::Element* const* keys, const uint64_t* words, int shift, int first, int end,
            const Real* queries, int64_t steps, const Rule<Real>& rule, Real* to, Real* peak) {
  constexpr int R = rows_at_once(C), L = Vec<Real>::n;
  for (int i = first; i < end; i += R) {
    const typename Op::Element* a[R];
    // The last group repeats its last key rather than being smaller.
    for (int r = 0; r < R; ++r) a[r] = keys[std::min(i + r, end - 1)];
    V<Real> sum[R][C] = {};
    for (int64_t l = 0; l < steps; ++l) {
      V<Real> b[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) b[c] = load(queries + l * kPanel + c * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        auto x = a[r][l];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = Op::add(sum[r][c], x, b[c]);
      }
    }
    V<Real> top[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) top[c] = load(peak + c * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      uint64_t word = words ? words[std::min(i + r, end - 1)] >> shift : ~0ull;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        V<Real> x = logit(sum[r][c], rule);
        if (words) x = masked<Real>(x, word >> (c * L));
        store(to + (i + r) * kPanel + c * L, x);
        top[c] = larger<Real>(x, top[c]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(peak + c * L, top[c]);
  }
}

// out[d] = out[d] * decay + sum over steps of value[step][d] * weight[step], by C vectors of queries.
template <class Op, int C, class Real = typename Op::Real>
void add_values(const typename Op::Element* values, int64_t stride, const Real* weights, int first, int end,
                int64_t dims, const Real* decay, Real* out) {
  constexpr int R = Op::kDims, L = Vec<Real>::n;
  for (int64_t d = 0; d < dims; d += R) {
    V<Real> sum[R][C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      V<Real> factor = load(decay + c * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][c] = load(out + (d + r) * kPanel + c * L) * factor;
    }
    const typename Op::Element* a = values + d + first * stride;
    for (int l = first; l < end; ++l, a += stride) {
      V<Real> b[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) b[c] = load(weights + l * kPanel + c * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        auto x = a[r];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] = Op::add(sum[r][c], x, b[c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) store(out + (d + r) * kPanel + c * L, sum[r][c]);
  }
}

// Calls f with the number of vectors as a compile-time constant, over `n` vectors from the left.
template <int C = kWide, class F>
inline void by_width(int n, F&& f) {
  int at = 0;
  for (; at + C <= n; at += C) f(std::integral_constant<int, C>{}, at);
  if constexpr (C > 1)
    if (at < n) by_width<C - 1>(n - at, [&](auto c, int v) { f(c, at + v); });
}

}  // namespace
