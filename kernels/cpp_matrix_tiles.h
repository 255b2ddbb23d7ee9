// The matrix tiles of AMX as C++ kernels use them, where there are any: HSA_TILES is then 1.

#pragma once

#include <cstdint>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HSA_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

// What was written stands in memory: compilers do not know that loads of tiles read it.
inline void settled() { __asm__ volatile("" ::: "memory"); }

// Eight tiles, for this thread as long as it lives: all of 16 rows of 64 bytes, or of the rows and bytes given. What
// others have set is put back.
class Tiles {
 public:
  static constexpr int kRows = 16, kBytes = 64;
  struct Shape {
    int rows, bytes;
  };

  Tiles() : Tiles({{kRows, kBytes}, {kRows, kBytes}, {kRows, kBytes}, {kRows, kBytes},
                   {kRows, kBytes}, {kRows, kBytes}, {kRows, kBytes}, {kRows, kBytes}}) {}
  explicit Tiles(const Shape (&shapes)[8]) {
    _tile_storeconfig(before_);
    alignas(64) uint8_t own[64] = {1};
    for (int i = 0; i < 8; ++i) own[16 + 2 * i] = shapes[i].bytes, own[48 + i] = shapes[i].rows;
    settled();
    _tile_loadconfig(own);
  }
  ~Tiles() {
    if (before_[0]) _tile_loadconfig(before_);
    else _tile_release();
  }
  Tiles(const Tiles&) = delete;

  // Whether the system lets this process use tiles, for which it must be asked.
  static bool allowed() {
    constexpr long kAsk = 0x1023, kTileData = 18;
    static const bool yes = syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
    return yes;
  }

 private:
  alignas(64) uint8_t before_[64];
};

}  // namespace

#endif
