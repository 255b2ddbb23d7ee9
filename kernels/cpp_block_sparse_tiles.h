// The forward with the matrix tiles of AMX, for bfloat16; see cpp_block_sparse.cpp.

#pragma once

#include "cpp_block_sparse_forward.h"

#include "cpp_matrix_tiles.h"

#if HSA_TILES

namespace {

// 32 rows of 16 numbers as 16 rows of 32; rows that are null are zeros.
inline void transpose_rows(const BFloat* const* rows, BFloat* to, int64_t stride) {
  V<float> square[16];
  for (int i = 0; i < 16; ++i) {
    __m512i pair = _mm512_setzero_si512();
    if (const BFloat* a = rows[2 * i])
      pair = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
    if (const BFloat* b = rows[2 * i + 1])
      pair = _mm512_or_si512(
          pair, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b))), 16));
    square[i] = (V<float>)pair;
  }
  transpose<float>(square);
  for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * stride, (__m512)square[i]);
}

// Logits and outputs are made of tiles of 16 keys or dims by 16 queries, in the same places as without tiles. The
// first factor of a product with values has them by dim: they are turned around once for each head, as far as they
// are read, and single keys for each chunk.
class TiledForward final : public Forward<Pair, BFloat> {
  using Base = Forward<Pair, BFloat>;
  static constexpr int kRows = Tiles::kRows, kGroup = 32;  // keys of a product with values

 public:
  explicit TiledForward(const Call& call)
      : Base(call, kGroup),
        // An odd number of lines of memory: rows of a power of two would share a few sets of the cache.
        stride_((round_up(call.kv_len, kGroup) / kGroup | 1) * kGroup),
        numbers_({{&turned_, call.value_dim * stride_ / 2},
                  {&chunk_keys_, kKeys * call.dim / 2},
                  {&chunk_values_, kKeys * call.value_dim / 2}}) {}

  bool ready() const { return Base::ready() && numbers_.ready(); }

  static bool takes(const Call& c) { return c.dim % 32 == 0 && c.value_dim % 32 == 0; }

 private:
  struct Rows {
    const BFloat* at;
    int64_t stride;
  };

  void take_chunk() override {
    int64_t head = item_.batch * c_.kv_heads + Base::kv_head();
    if (head != head_) {
      head_ = head;
      known_.assign(stride_ / kGroup, 0);
    }
    const BFloat* keys = head_of<BFloat>(c_.k, item_.batch, Base::kv_head());
    const BFloat* values = head_of<BFloat>(c_.v, item_.batch, Base::kv_head());
    for (int i = 0; i < count_; i += kRows) {
      if (is_run(i, kRows)) {
        key_rows_[i / kRows] = {keys + tokens_[i] * c_.k.token, c_.k.token};
        continue;
      }
      BFloat* to = reinterpret_cast<BFloat*>(chunk_keys_) + i * c_.dim;
      key_rows_[i / kRows] = {to, c_.dim};
      for (int j = i; j < i + kRows; ++j, to += c_.dim)
        if (j < count_) std::memcpy(to, keys + tokens_[j] * c_.k.token, c_.dim * sizeof(BFloat));
        else std::memset(to, 0, c_.dim * sizeof(BFloat));
    }
    // The second half of the last group, where it has no key.
    if ((count_ + kRows - 1) / kRows % 2) key_rows_[(count_ + kRows - 1) / kRows] = key_rows_[(count_ - 1) / kRows];
    for (int i = 0; i < count_; i += kGroup) {
      if (is_run(i, kGroup)) {
        BFloat* all = reinterpret_cast<BFloat*>(turned_);
        for (int64_t group = tokens_[i] / kGroup; group * kGroup < tokens_[i] + kGroup; ++group) {
          if (known_[group]) continue;
          known_[group] = 1;
          turn(values, [&](int j) { return group * kGroup + j < c_.kv_len ? group * kGroup + j : -1; },
               all + group * kGroup, stride_);
        }
        value_rows_[i / kGroup] = {all + tokens_[i], stride_};
      } else {
        BFloat* to = reinterpret_cast<BFloat*>(chunk_values_) + i;
        turn(values, [&](int j) { return i + j < count_ ? tokens_[i + j] : -1; }, to, kKeys);
        value_rows_[i / kGroup] = {to, kKeys};
      }
    }
  }

  // 32 tokens' values, by dim; a token of less than 0 is none.
  template <class F>
  void turn(const BFloat* values, F token, BFloat* to, int64_t stride) const {
    const BFloat* rows[kGroup];
    for (int j = 0; j < kGroup; ++j) rows[j] = token(j) < 0 ? nullptr : values + token(j) * c_.v.token;
    for (int64_t d = 0; d < c_.value_dim; d += 16, to += 16 * stride) {
      transpose_rows(rows, to, stride);
      for (auto& row : rows) row += row ? 16 : 0;
    }
  }

  bool is_run(int first, int n) const {
    if (first + n > count_) return false;
    int64_t apart = 0;
    for (int i = 1; i < n; ++i) apart |= tokens_[first + i] - tokens_[first] - i;
    return apart == 0;
  }

  void attend(int panel, int left, int right, const uint64_t* words, int first, int end) override {
    int last = round_up(end, kGroup);
    const float* queries = queries_ + panel * steps_ * kPanel;
    for (int i = first; i < last; i += kGroup)
      for (int v = left; v < right; v += 2) multiply_keys(i, queries + v * L, logits_ + i * kPanel + v * L);
    for (int i = end; i < last; ++i)
      for (int v = left; v < right; ++v) store(logits_ + i * kPanel + v * L, splat<float>(kNothing));
    std::copy_n(peaks_ + panel * kPanel, kPanel, peak_);
    // Where nothing but a factor comes between, the weights are made of the products themselves.
    bool bare = !words && rule_.cap == 0 && rule_.factor > 0;
    float* sums = sums_ + panel * dims_ * kPanel;
    for (int v = left; v < right; ++v) {
      bare ? find_peak(v * L, first, end) : finish(words, v * L, first, end);
      weigh_pairs(panel, v * L, first, last, bare ? rule_.factor : 1.0f);
      V<float> factor = load(decay_ + v * L);
      if (_mm512_cmpneq_ps_mask((__m512)factor, _mm512_set1_ps(1)))
        for (int64_t d = 0; d < dims_; ++d) store(sums + d * kPanel + v * L, load(sums + d * kPanel + v * L) * factor);
    }
    for (int v = left; v < right; v += 2)
      for (int64_t d = 0; d < dims_; d += 2 * kRows) add_products(d, first, last, v * L, sums + d * kPanel + v * L);
  }

  void find_peak(int at, int first, int end) {
    // Several at a time: each comparison waits for the one before.
    constexpr int n = 4;
    V<float> top[n];
    for (auto& one : top) one = splat<float>(kNothing);
    int i = first;
    for (; i + n <= end; i += n)
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) top[j] = larger<float>(load(logits_ + (i + j) * kPanel + at), top[j]);
    for (; i < end; ++i) top[0] = larger<float>(load(logits_ + i * kPanel + at), top[0]);
    V<float> all = larger<float>(larger<float>(top[0], top[1]), larger<float>(top[2], top[3]));
    store(peak_ + at, larger<float>(all * rule_.factor, load(peak_ + at)));
  }

  // As `weigh`, of whole groups of keys. Weights become bfloat16: a polynomial of degree 4 is as good.
  void weigh_pairs(int panel, int at, int first, int last, float scale) {
    float *peak = peaks_ + panel * kPanel + at, *total = totals_ + panel * kPanel + at;
    V<float> before = load(peak), now = load(peak_ + at), shift = now == kNothing ? splat<float>(0) : now;
    store(peak, now);
    V<float> factor = power_of_two(before - shift);
    store(decay_ + at, factor);
    const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(0xffff0000);
    V<float> sums[2] = {load(total) * factor, splat<float>(0)};
    const float* from = logits_ + first * kPanel + at;
    float* to = logits_ + first / 2 * kPanel + at;
    for (int i = first; i < last; i += 4, from += 4 * kPanel, to += 2 * kPanel) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        V<float> a = weight(load(from + 2 * j * kPanel) * scale - shift);
        V<float> b = weight(load(from + (2 * j + 1) * kPanel) * scale - shift);
        sums[j] += a + b;
        // Rounded to nearest: weights are never negative.
        __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)a, half), 16);
        __m512i high = _mm512_add_epi32((__m512i)b, half);
        store(to + j * kPanel, (V<float>)_mm512_ternarylogic_epi32(low, high, upper, 0xf8));
      }
    }
    store(total, sums[0] + sums[1]);
  }

  // 2 ** x as `power_of_two` has it, but 2 ** -126 for all that is less: no weight, beside that of the peak.
  static V<float> weight(V<float> x) {
    const V<float> magic = splat<float>(12582912.0f);
    // In this order a NaN stays one.
    x = (V<float>)_mm512_max_ps(_mm512_set1_ps(-126), (__m512)x);
    V<float> shifted = x + magic, f = x - (shifted - magic);
    V<float> p = splat<float>(9.582853169e-03f);
    p = p * f + splat<float>(5.590642504e-02f);
    p = p * f + splat<float>(2.402409861e-01f);
    p = p * f + splat<float>(6.931241934e-01f);
    p = p * f + splat<float>(1.0f);
    return (V<float>)((I<float>)p + ((I<float>)shifted << 23));
  }

  // Products to logits, in place.
  void finish(const uint64_t* words, int at, int first, int end) {
    V<float> top = load(peak_ + at);
    for (int i = first; i < end; ++i) {
      V<float> x = logit<float>(load(logits_ + i * kPanel + at), rule_);
      if (words)
        x = (V<float>)_mm512_mask_mov_ps(_mm512_set1_ps(kNothing), static_cast<__mmask16>(words[i] >> at), (__m512)x);
      store(logits_ + i * kPanel + at, x);
      top = larger<float>(x, top);
    }
    store(peak_ + at, top);
  }

  // 32 keys from i on by 32 queries.
  void multiply_keys(int i, const float* queries, float* to) const {
    const Rows &a = key_rows_[i / kRows], &b = key_rows_[i / kRows + 1];
    constexpr int64_t kLine = kPanel * sizeof(float);
    settled();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t l = 0; l < c_.dim; l += 32, queries += 16 * kPanel) {
      _tile_loadd(4, a.at + l, a.stride * sizeof(BFloat));
      _tile_loadd(5, b.at + l, b.stride * sizeof(BFloat));
      _tile_loadd(6, queries, kLine);
      _tile_loadd(7, queries + L, kLine);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, kLine);
    _tile_stored(1, to + L, kLine);
    _tile_stored(2, to + kRows * kPanel, kLine);
    _tile_stored(3, to + kRows * kPanel + L, kLine);
  }

  // 32 dims from d on by 32 queries: adds the keys first..last, which are weighed.
  void add_products(int64_t d, int first, int last, int at, float* sums) const {
    constexpr int64_t kLine = kPanel * sizeof(float);
    settled();
    _tile_loadd(0, sums, kLine);
    _tile_loadd(1, sums + L, kLine);
    _tile_loadd(2, sums + kRows * kPanel, kLine);
    _tile_loadd(3, sums + kRows * kPanel + L, kLine);
    for (int i = first; i < last; i += kGroup) {
      const Rows& values = value_rows_[i / kGroup];
      const float* weights = logits_ + i / 2 * kPanel + at;
      _tile_loadd(4, values.at + d * values.stride, values.stride * sizeof(BFloat));
      _tile_loadd(5, values.at + (d + kRows) * values.stride, values.stride * sizeof(BFloat));
      _tile_loadd(6, weights, kLine);
      _tile_loadd(7, weights + L, kLine);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + L, kLine);
    _tile_stored(2, sums + kRows * kPanel, kLine);
    _tile_stored(3, sums + kRows * kPanel + L, kLine);
  }

  Tiles tiles_;
  Rows key_rows_[kKeys / kRows], value_rows_[kKeys / kGroup];
  int64_t stride_, head_ = -1;
  std::vector<uint8_t> known_;
  float *turned_, *chunk_keys_, *chunk_values_;
  Memory<float> numbers_;
};

}  // namespace

#endif
