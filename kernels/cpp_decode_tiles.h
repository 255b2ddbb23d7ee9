// A chunk of keys by a few queries with the matrix tiles of AMX, for bfloat16; see cpp_decode.cpp.

#pragma once

#include "cpp_decode_chunk.h"
#include "cpp_matrix_tiles.h"

#if HSA_TILES

namespace {

// S vectors of [lanes, S] numbers become those of each of the S; even ones of them first.
template <int S>
inline void part(F* x) {
  if constexpr (S > 1) {
    I<float> even, odd;
    for (int i = 0; i < kLanes; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
    F halves[2][S / 2];
#pragma GCC unroll 8
    for (int i = 0; i < S / 2; ++i) {
#if defined(__clang__)
      for (int j = 0; j < kLanes; ++j)
        halves[0][i][j] = (j < kLanes / 2 ? x[2 * i] : x[2 * i + 1])[even[j] % kLanes],
        halves[1][i][j] = (j < kLanes / 2 ? x[2 * i] : x[2 * i + 1])[odd[j] % kLanes];
#else
      halves[0][i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even);
      halves[1][i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], odd);
#endif
    }
    part<S / 2>(halves[0]), part<S / 2>(halves[1]);
#pragma GCC unroll 8
    for (int i = 0; i < S / 2; ++i) x[2 * i] = halves[0][i], x[2 * i + 1] = halves[1][i];
  }
}

// The two products of Pass<BFloat, C>, in tiles. Keys are the rows of a tile as they lie in memory. Values are
// interleaved by pairs of keys, once for all queries; numbers of a sum then stand in the order of `place`.
template <int C>
class TilePass {
  static constexpr int kStep = 32;  // bfloat16 of a row of a tile
  static constexpr int kRows = Tiles::kRows, kSlots = Pass<BFloat, C>::kSlots;

 public:
  explicit TilePass(const Sizes& sizes, float* scratch)
      : sizes_(sizes), values_(reinterpret_cast<__m512i*>(scratch)), keys_(values_ + value_lines(sizes)),
        weights_(keys_ + 2 * kRows * sizes.key_steps),
        tiles_({{kRows, kSlots * 4}, {kRows, kSlots * 4}, {kRows, kSlots * 4}, {kRows, 64},
                {C, 64}, {C, 64}, {C, 64}, {kRows, 64}}) {}

  // Whether tiles can be used for heads of these dims, and the system lets this process use them.
  static bool takes(int64_t dim, int64_t value_dim) {
    return dim % kStep == 0 && value_dim % kStep == 0 && Tiles::allowed();
  }

  // Numbers that `scratch` must hold.
  static int64_t scratch(const Sizes& sizes) {
    return (value_lines(sizes) + 2 * kRows * sizes.key_steps + kSlots * kChunk / kStep) * kLanes;
  }

  // The place within a step of values of a lane of one of its two vectors.
  static int place(int vector, int lane) { return lane / 4 * 8 + vector * 4 + lane % 4; }

  // Puts a query where `products` wants it: [steps, 16 pairs of dims, kSlots].
  static void take_query(const BFloat* row, int64_t steps, int slot, float* queries) {
    for (int64_t pair = 0; pair < steps * kRows; ++pair)
      std::memcpy(queries + pair * kSlots + slot, row + 2 * pair, 4);
  }

  // See Pass.
  void products(const Chunk<BFloat>& chunk, const float* queries, bool ahead, float* to) {
    settled();
    for (int i = 0; i < chunk.count; i += 2 * kRows) {
      for (int j = i; ahead && j < std::min(i + 2 * kRows, chunk.count); ++j)
        fetch(chunk.values[j], sizes_.value_dim);
      // Of two tiles of keys side by side the second may have none: it repeats the first.
      bool both = i + kRows < chunk.count;
      Rows a = rows_of(chunk, i, 0), b = both ? rows_of(chunk, i + kRows, 1) : a;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < sizes_.key_steps; ++s) {
        _tile_loadd(2, queries + s * kRows * kSlots, kSlots * 4);
        _tile_loadd(3, a.at + s * kStep, a.stride * 2);
        _tile_loadd(7, b.at + s * kStep, b.stride * 2);
        _tile_dpbf16ps(0, 3, 2);
        _tile_dpbf16ps(1, 7, 2);
      }
      _tile_stored(0, to + i * kSlots, kSlots * 4);
      if (both) _tile_stored(1, to + (i + kRows) * kSlots, kSlots * 4);
    }
    settled();
  }

  // Interleaves the values of a chunk; keys of the one that comes `next` are fetched meanwhile.
  void take_values(const Chunk<BFloat>& chunk, const Chunk<BFloat>* next) {
    for (int i = 0; i < kChunk && i / kStep * kStep < chunk.count; i += 2) {
      for (int j = i; next && j < std::min(i + 2, next->count); ++j) fetch(next->keys[j], sizes_.dim);
      __m512i* to = values_ + i / kStep * 2 * kRows + i % kStep / 2;
      for (int64_t s = 0; s < sizes_.value_steps; ++s, to += kChunk) {
        // Keys that are not there are zeros.
        __m512i a = line(chunk, i, s), b = line(chunk, i + 1, s);
        to[0] = _mm512_unpacklo_epi16(a, b), to[kRows] = _mm512_unpackhi_epi16(a, b);
      }
    }
  }

  // See Pass; of the values that were taken.
  void add_values(const Chunk<BFloat>& chunk, float* weights, const float* decay, float* out) {
    int halves = (chunk.count + kStep - 1) / kStep, read = (chunk.count * kSlots + kLanes - 1) / kLanes * kLanes;
    std::fill(weights + read, weights + halves * kStep * kSlots, 0.0f);
    for (int half = 0; half < halves; ++half) {
      F x[2][kSlots];
      for (int i = 0; i < 2; ++i) {
        for (int c = 0; c < kSlots; ++c) x[i][c] = load(weights + ((2 * half + i) * kSlots + c) * kLanes);
        part<kSlots>(x[i]);
      }
      for (int c = 0; c < C; ++c)
        weights_[half * kSlots + c] = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1][c], (__m512)x[0][c]);
    }
    int64_t width = sizes_.value_steps * kStep;
    for (int c = 0; c < C; ++c)
      if (decay[c] != 1)
        for (int64_t d = 0; d < width; d += kLanes) store(out + c * width + d, load(out + c * width + d) * decay[c]);
    settled();
    const __m512i* from = values_;
    for (int64_t s = 0; s < sizes_.value_steps; ++s, from += kChunk) {
      float* at = out + s * kStep;
      _tile_loadd(5, at, width * 4);
      _tile_loadd(6, at + kLanes, width * 4);
      for (int half = 0; half < halves; ++half) {
        _tile_loadd(4, weights_ + half * kSlots, 64);
        _tile_loadd(3, from + half * 2 * kRows, 64);
        _tile_loadd(7, from + half * 2 * kRows + kRows, 64);
        _tile_dpbf16ps(5, 4, 3);
        _tile_dpbf16ps(6, 4, 7);
      }
      _tile_stored(5, at, width * 4);
      _tile_stored(6, at + kLanes, width * 4);
    }
    settled();
  }

 private:
  // Lines of the interleaved values of a chunk: for each step and half of the keys two tiles.
  static int64_t value_lines(const Sizes& sizes) { return sizes.value_steps * kChunk; }

  static inline __m512i line(const Chunk<BFloat>& chunk, int i, int64_t step) {
    return i < chunk.count ? _mm512_loadu_si512(chunk.values[i] + step * kStep) : _mm512_setzero_si512();
  }

  struct Rows {
    const BFloat* at;
    int64_t stride;
  };

  // 16 keys from `first` on where they lie, or copied to one of two places where they are not beside one another.
  Rows rows_of(const Chunk<BFloat>& chunk, int first, int place) {
    const BFloat* rows = chunk.keys[first];
    bool is_run = first + kRows <= chunk.count;
    for (int i = 1; is_run && i < kRows; ++i) is_run = chunk.keys[first + i] == rows + i * sizes_.key_stride;
    if (is_run) return {rows, sizes_.key_stride};
    BFloat* copied = reinterpret_cast<BFloat*>(keys_ + place * kRows * sizes_.key_steps);
    for (int i = 0; i < kRows; ++i)
      std::memcpy(copied + i * sizes_.dim, chunk.keys[std::min(first + i, chunk.count - 1)], sizes_.dim * 2);
    settled();
    return {copied, sizes_.dim};
  }

  const Sizes& sizes_;
  __m512i *values_, *keys_, *weights_;
  Tiles tiles_;
};

template <class Stored>
constexpr bool kTiled = std::is_same_v<Stored, BFloat>;

}  // namespace

#else

namespace {

template <int C>
class TilePass;
template <class Stored>
constexpr bool kTiled = false;

}  // namespace

#endif
