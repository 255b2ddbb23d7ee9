// Block-sparse attention over a BlockPattern on CPUs, forward and backward; see cpp_block_sparse.py, which compiles it.
// Needs GCC's vector extensions and OpenMP, and nothing of torch.
//
// STORED is the type of the tensors, and BACKWARD which of the two is made: a library holds one of each, so that the
// first call waits for no more than it uses.
//
// One item of work is up to 128 queries of one row of one head. Queries stand in the lanes of vectors: the logits are
// computed as keys x queries from the transposed queries, so that keys and values are broadcast element by element
// from where they lie. A key is a pointer: blocks from any start, single columns and orders of the keys are all the
// same, nothing but the keys of a row is ever read, and a row is as long as it is.

#if BACKWARD
#include "cpp_block_sparse_backward.h"
#else
#include "cpp_block_sparse_forward.h"
#include "cpp_block_sparse_tiles.h"
#endif

namespace {

#if BACKWARD

template <class Real, class Stored>
int64_t backward(const Call& c) {
  std::atomic<int64_t> failed{0};
  int64_t n = c.batch * c.kv_heads * c.splits;
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(c.threads, n)))
  {
    Backward<Real, Stored> worker(c);
    if (!worker.ready()) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) {
      std::vector<Item> work;
      int64_t split = i % c.splits, head = i / c.splits;
      add_items(c, head / c.kv_heads, head % c.kv_heads, split, c.splits, &work);
      for (const Item& item : work)
        if (!failed) worker.run(item, split);
    }
  }
  return failed;
}

#else

template <class Worker>
int64_t forward(const Call& c) {
  // One key/value head after the other keeps its keys in cache.
  std::vector<Item> work;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t head = 0; head < c.kv_heads; ++head) add_items(c, b, head, 0, 1, &work);
  std::atomic<int64_t> failed{0};
  int64_t n = work.size();
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(c.threads, n)))
  {
    Worker worker(c);
    if (!worker.ready()) failed = 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i)
      if (!failed) worker.run(work[i]);
  }
  return failed;
}

#endif

}  // namespace

extern "C" {

// sizeof(Call), by which a caller checks that it means the same.
int64_t hsa_call_bytes() { return sizeof(Call); }

// 0, or 1 where there is no memory.
int64_t hsa_run(const Call* call) {
#if BACKWARD
  return backward<std::conditional_t<std::is_same_v<STORED, double>, double, float>, STORED>(*call);
#else
#if HSA_TILES
  if constexpr (std::is_same_v<STORED, BFloat>)
    if (TiledForward::takes(*call) && Tiles::allowed()) return forward<TiledForward>(*call);
#endif
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<STORED, BFloat>)
    if (call->dim % 2 == 0) return forward<Forward<Pair, BFloat>>(*call);
#endif
  return forward<Forward<Single<std::conditional_t<std::is_same_v<STORED, double>, double, float>>, STORED>>(*call);
#endif
}

// Tiles bool [n, block_q, block_k] as words [n, panels of 64 queries, block_k], a bit for each query.
void hsa_tile_words(const uint8_t* tiles, int64_t n, int64_t block_q, int64_t block_k, uint64_t* words) {
  int64_t panels = (block_q + kPanel - 1) / kPanel;
  std::fill_n(words, n * panels * block_k, 0);
  for (int64_t t = 0; t < n; ++t)
    for (int64_t q = 0; q < block_q; ++q) {
      const uint8_t* row = tiles + (t * block_q + q) * block_k;
      uint64_t* to = words + (t * panels + q / kPanel) * block_k;
      for (int64_t k = 0; k < block_k; ++k) to[k] |= static_cast<uint64_t>(row[k] != 0) << (q % kPanel);
    }
}
}
