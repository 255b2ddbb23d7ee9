// Attention of a few queries over one chunk of keys: dims stand in the lanes of vectors; see cpp_decode.cpp.

#pragma once

#include "cpp_block_sparse_vectors.h"

namespace {

constexpr int kLanes = Vec<float>::n;
constexpr int kChunk = 64;     // keys between two updates of the output
constexpr int kLine = 64;      // bytes that memory is fetched by
using F = V<float>;

// ------------------------------------------------------------------ stored numbers as vectors

// Bytes of a row as they lie; what is beyond `bytes` is zero and is not read.
inline I<float> raw(const void* from) {
  I<float> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline I<float> raw(const void* from, int bytes) {
#if defined(__AVX512BW__)
  return (I<float>)_mm512_maskz_loadu_epi8(~0ull >> (64 - bytes), from);
#else
  I<float> x = {};
  std::memcpy(&x, from, bytes);
  return x;
#endif
}

// A vector's bytes of stored numbers as kParts vectors of float, in an order of their own: `place` tells the number
// that stands in a lane of a part.
template <class Stored>
struct Widened {
  static constexpr int kParts = 1, kStep = kLanes;
  static inline void parts(I<float> x, F* to) { to[0] = (F)x; }
  static inline int place(int, int lane) { return lane; }
};
template <>
struct Widened<BFloat> {
  static constexpr int kParts = 2, kStep = 2 * kLanes;
  static inline void parts(I<float> x, F* to) {
    to[0] = (F)(x << 16);
    to[1] = (F)(x & static_cast<int32_t>(0xffff0000));
  }
  static inline int place(int part, int lane) { return 2 * lane + part; }
};
template <>
struct Widened<Half> {
  static constexpr int kParts = 2, kStep = 2 * kLanes;
  static inline void parts(I<float> x, F* to) {
#if defined(__AVX512F__)
    to[0] = (F)_mm512_cvtph_ps(_mm512_castsi512_si256((__m512i)x));
    to[1] = (F)_mm512_cvtph_ps(_mm512_extracti64x4_epi64((__m512i)x, 1));
#elif defined(__F16C__) && defined(__AVX__)
    to[0] = (F)_mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)x));
    to[1] = (F)_mm256_cvtph_ps(_mm256_extractf128_si256((__m256i)x, 1));
#else
    Half from[kStep];
    std::memcpy(from, &x, sizeof from);
    for (int i = 0; i < kStep; ++i) to[i / kLanes][i % kLanes] = widened(from[i]);
#endif
  }
  static inline int place(int part, int lane) { return part * kLanes + lane; }
};

// How a key is multiplied with queries: kParts vectors of a step of it, each with one of the query.
template <class Stored>
struct Product {
  static constexpr int kParts = Widened<Stored>::kParts;
  static inline void parts(I<float> x, F* to) { Widened<Stored>::parts(x, to); }
  static inline F add(F sum, F a, F b) { return sum + a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Product<BFloat> {
  static constexpr int kParts = 1;
  static inline void parts(I<float> x, F* to) { to[0] = (F)x; }
  static inline F add(F sum, F a, F b) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
};
#endif

// ------------------------------------------------------------------ lanes

// Lane i of the result is the sum of the lanes of vector i.
template <int S = 1>
inline void sum_lanes(F* rows) {
  // Half of the lanes stay where they are: blending is cheaper than moving.
  I<float> kept, moved;
  for (int i = 0; i < kLanes; ++i) kept[i] = i & S ? kLanes + i : i, moved[i] = i & S ? kLanes + i - S : i + S;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * S) {
    F a = rows[i], b = rows[i + S];
#if defined(__clang__)
    F x, y;
    for (int j = 0; j < kLanes; ++j) x[j] = j & S ? b[j] : a[j], y[j] = j & S ? b[j - S] : a[j + S];
#else
    F x = __builtin_shuffle(a, b, kept), y = __builtin_shuffle(a, b, moved);
#endif
    rows[i] = x + y;
  }
  if constexpr (2 * S < kLanes) sum_lanes<2 * S>(rows);
}

// The largest of every S-th lane, in all of them.
template <int S>
inline F largest_of(F x) {
  if constexpr (S >= kLanes) return x;
  else {
    F y;
    for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ S];
    return largest_of<2 * S>(larger<float>(x, y));
  }
}

// ------------------------------------------------------------------ a chunk

template <class Stored>
struct Chunk {
  int count = 0;
  bool limited = false;
  const Stored *keys[kChunk], *values[kChunk];
  uint64_t words[kChunk];  // where limited: a bit for each query of the row
};

// Memory of a row is fetched while something else is computed.
template <class Stored>
inline void fetch(const Stored* row, int64_t dims) {
  for (int64_t b = 0; b < static_cast<int64_t>(dims * sizeof(Stored)); b += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(row) + b);
}

struct Sizes {
  int64_t dim, value_dim, key_steps, value_steps;  // steps of a vector's bytes
  int64_t key_stride;                              // elements from a key to the next
  Rule<float> rule;
  bool tiles;  // whether the matrix tiles of AMX are used
};

// C queries that are computed side by side. Logits of R keys stand in one vector, those of a key beside one another.
template <class Stored, int C>
struct Pass {
  static constexpr int kSlots = C > 8 ? 16 : C > 4 ? 8 : C > 2 ? 4 : C;
  static_assert(kSlots <= kLanes, "queries of a pass must fit a vector");
  static constexpr int R = kLanes / kSlots;
  using Keys = Product<Stored>;
  using Values = Widened<Stored>;

  // Products of keys and queries to `to`, [keys, kSlots]; values are fetched meanwhile if `ahead`.
  static void products(const Chunk<Stored>& chunk, const Sizes& sizes, const float* queries, bool ahead, float* to) {
    constexpr int kStep = Values::kStep;
    int64_t whole = sizes.dim / kStep;
    int rest = static_cast<int>((sizes.dim - whole * kStep) * sizeof(Stored));
    for (int i = 0; i < chunk.count; i += R) {
      const Stored* at[R];
      // The last group repeats its last key rather than being smaller.
      for (int r = 0; r < R; ++r) at[r] = chunk.keys[std::min(i + r, chunk.count - 1)];
      for (int r = 0; ahead && r < R; ++r) fetch(chunk.values[std::min(i + r, chunk.count - 1)], sizes.value_dim);
      F sum[R][C] = {};
      for (int64_t s = 0; s < whole; ++s) multiply(at, s, 0, queries, sum);
      if (rest) multiply(at, whole, rest, queries, sum);
      F all[kLanes] = {};
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) all[r * kSlots + c] = sum[r][c];
      sum_lanes(all);
      store(to + i * kSlots, all[0]);
    }
  }

  // Products to logits, in place; returns the largest of each query, in all its lanes. Query c is the `first` + c-th,
  // and the bit of the words is its number modulo `queries`.
  static F limit(const Chunk<Stored>& chunk, const Rule<float>& rule, int first, int queries, float* to) {
    const F nothing = splat<float>(-std::numeric_limits<float>::infinity());
    F top = nothing;
    for (int i = 0; i < chunk.count; i += R) {
      F x = logit(load(to + i * kSlots), rule);
      if (i + R > chunk.count || chunk.limited)
        for (int r = 0; r < R; ++r)
          for (int c = 0; c < C; ++c) {
            bool kept = i + r < chunk.count && (!chunk.limited || chunk.words[i + r] >> (first + c) % queries & 1);
            if (!kept) x[r * kSlots + c] = nothing[0];
          }
      store(to + i * kSlots, x);
      top = larger<float>(x, top);
    }
    return largest_of<kSlots>(top);
  }

  // Logits to weights, in place; returns their sums by lane.
  static F weigh(int count, F peak, float* logits) {
    const F zero = {};
    // Where no key was read yet the peak is -inf: 0 instead gives weights 0, not NaN.
    F shift = peak == splat<float>(-std::numeric_limits<float>::infinity()) ? zero : peak, sum = zero;
    for (int i = 0; i < count; i += R) {
      F weight = power_of_two(load(logits + i * kSlots) - shift);
      sum += weight;
      store(logits + i * kSlots, weight);
    }
    return sum;
  }

  // out[c] = out[c] * decay[c] + sum over keys of weight[c] * value; rows of `out` are as wide as the steps of values.
  // The keys of the chunk that comes `next`, if given, are fetched meanwhile.
  static void add_values(const Chunk<Stored>& chunk, const Sizes& sizes, const float* weights, const float* decay,
                         const Chunk<Stored>* next, float* out) {
    by_queries<0>([&](auto from, auto n) {
      constexpr int kFrom = decltype(from)::value, N = decltype(n)::value;
      constexpr int kParts = Values::kParts, kSteps = std::max(1, (N > 4 ? 2 : N > 2 ? 4 : 8) / kParts);
      int64_t whole = sizes.value_dim / Values::kStep, s = 0;
      for (; s + kSteps <= whole; s += kSteps) take<kFrom, N, kSteps>(chunk, sizes, weights, decay, s, 0, kFrom == 0 && s == 0 ? next : nullptr, out);
      for (; s < whole; ++s) take<kFrom, N, 1>(chunk, sizes, weights, decay, s, 0, nullptr, out);
      int rest = static_cast<int>((sizes.value_dim - whole * Values::kStep) * sizeof(Stored));
      if (rest) take<kFrom, N, 1>(chunk, sizes, weights, decay, s, rest, nullptr, out);
    });
  }

 private:
  // One step of dims of R keys by all queries; `rest` bytes of it where the row ends within.
  static inline void multiply(const Stored* const* at, int64_t step, int rest, const float* queries, F (&sum)[R][C]) {
    constexpr int P = Keys::kParts;
    const float* query = queries + step * C * P * kLanes;
    F key[R][P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Stored* from = at[r] + step * Values::kStep;
      Keys::parts(rest ? raw(from, rest) : raw(from), key[r]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        F by = load(query + (c * P + p) * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r][c] = Keys::add(sum[r][c], key[r][p], by);
      }
  }

  // Queries by as many as have room for their sums.
  template <int From, class Call>
  static inline void by_queries(Call&& call) {
#if defined(__AVX512F__) || defined(__aarch64__)
    constexpr int kMost = 8;
#else
    constexpr int kMost = 4;
#endif
    constexpr int n = std::min(C - From, kMost);
    call(std::integral_constant<int, From>{}, std::integral_constant<int, n>{});
    if constexpr (From + n < C) by_queries<From + n>(call);
  }

  // `Steps` steps of dims of all values by N queries.
  template <int From, int N, int Steps>
  static inline void take(const Chunk<Stored>& chunk, const Sizes& sizes, const float* weights, const float* decay,
                          int64_t step, int rest, const Chunk<Stored>* next, float* out) {
    constexpr int kParts = Values::kParts, kVectors = Steps * kParts;
    int64_t width = sizes.value_steps * kParts * kLanes;
    float* at = out + From * width + step * kParts * kLanes;
    F sum[N][kVectors];
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c)
#pragma GCC unroll 8
      for (int p = 0; p < kVectors; ++p) sum[c][p] = load(at + c * width + p * kLanes) * decay[From + c];
    for (int i = 0; i < chunk.count; ++i) {
      if (next && i < next->count) fetch(next->keys[i], sizes.dim);
      F value[kVectors];
      const Stored* row = chunk.values[i] + step * Values::kStep;
#pragma GCC unroll 8
      for (int s = 0; s < Steps; ++s)
        Values::parts(rest ? raw(row, rest) : raw(row + s * Values::kStep), value + s * kParts);
      const float* weight = weights + i * kSlots + From;
#pragma GCC unroll 16
      for (int c = 0; c < N; ++c)
#pragma GCC unroll 8
        for (int p = 0; p < kVectors; ++p) sum[c][p] += weight[c] * value[p];
    }
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c)
#pragma GCC unroll 8
      for (int p = 0; p < kVectors; ++p) store(at + c * width + p * kLanes, sum[c][p]);
  }
};

}  // namespace
