// The call, its items of work, and how an item reads its queries and its keys; see cpp_block_sparse.cpp.

#pragma once

#include "cpp_block_sparse_vectors.h"
#include "cpp_tensors.h"

namespace {

// Mirrored by cpp_block_sparse.py. Real is float, or double for double input.
struct Call {
  Tensor4 q, k, v, out, grad_out, grad_q;
  void* lse;                 // Real [batch, heads, q_len]
  const void* shift;         // Real [batch, heads, q_len]: sum(grad_out * out) - grad_lse
  void *grad_k, *grad_v;     // Real [splits, batch, kv_heads, kv_len, pad], zeros at first
  const int64_t *indptr, *column_indptr, *q_order, *kv_order;
  const int32_t *starts, *tile_ids, *columns, *kv_range;
  const uint64_t* tiles;     // [tiles, panels of a row, block_k]
  int64_t threads, splits;
  int64_t batch, heads, kv_heads, q_len, kv_len, dim, value_dim, dim_pad, value_dim_pad;
  int64_t block_q, block_k, rows;
  // Leading sizes of the pattern's parts: 1 or batch, 1 or heads.
  int64_t blocks_batch, blocks_heads, columns_batch, columns_heads;
  int64_t q_order_batch, q_order_heads, kv_order_batch, kv_order_heads, kv_range_batch;
  double scale, softcap;
};

struct Item {
  int64_t batch, head, row, part;
};

template <class Real>
Rule<Real> rule_of(const Call& c) {
  // Powers of two instead of e: their logits are larger by log2(e).
  return {Real(c.scale * M_LOG2E), Real(c.softcap * M_LOG2E),
          Real(c.softcap != 0 ? 2 * c.scale / c.softcap * M_LOG2E : 0)};
}

// Aligned memory cut into parts, each a multiple of 64 numbers.
template <class Real>
class Memory {
 public:
  explicit Memory(std::initializer_list<std::pair<Real**, int64_t>> parts) {
    int64_t total = 0;
    for (auto& part : parts) total += round_up(part.second, 64);
    all_.reset(static_cast<Real*>(std::aligned_alloc(64, std::max<int64_t>(total, 64) * sizeof(Real))));
    Real* at = all_.get();
    for (auto& part : parts) *part.first = at, at += round_up(part.second, 64);
  }
  bool ready() const { return all_ != nullptr; }

 private:
  struct Free {
    void operator()(Real* p) const { std::free(p); }
  };
  std::unique_ptr<Real, Free> all_;
};

// The queries of one item, and its keys in chunks.
template <class Op, class Stored>
class Reader {
 public:
  using Real = typename Op::Real;
  using Element = typename Op::Element;
  static constexpr int L = Vec<Real>::n;
  static constexpr bool kAsStored = std::is_same_v<Stored, Real>;
  static constexpr bool kPairs = Op::kStep == 2;

 protected:
  explicit Reader(const Call& call) : c_(call) {}
  virtual ~Reader() = default;

  // Attention over the keys of the chunk.
  virtual void attend_chunk() = 0;

  void begin(const Item& item) {
    item_ = item;
    first_query_ = item.row * c_.block_q + item.part * kPanels * kPanel;
    int64_t in_row = std::min(c_.block_q, c_.q_len - item.row * c_.block_q);
    queries_here_ = std::min<int64_t>(in_row - item.part * kPanels * kPanel, kPanels * kPanel);
    panels_ = static_cast<int>((queries_here_ + kPanel - 1) / kPanel);
  }

  // ---- queries

  int queries(int panel) const {
    return static_cast<int>(std::min<int64_t>(queries_here_ - panel * kPanel, kPanel));
  }
  int vectors(int panel) const { return (queries(panel) + L - 1) / L; }

  // A bit for each query of a panel.
  uint64_t present(int panel) const { return ~0ull >> (kPanel - queries(panel)); }

  // Token of a query of a panel; the last one again for lanes without a query.
  int64_t query_token(int panel, int i) const {
    int64_t place = first_query_ + panel * kPanel + std::min(i, queries(panel) - 1);
    return c_.q_order ? c_.q_order[lead(item_, c_.q_order_batch, c_.q_order_heads) * c_.q_len + place] : place;
  }

  // A panel's rows of a tensor like the queries, as [steps, kPanel]; `spare` holds L rows.
  void take_transposed(const Tensor4& x, int64_t steps, int panel, Real* spare, Real* to) const {
    const Stored* base = head_of<Stored>(x, item_.batch, item_.head);
    for (int v = 0; v < vectors(panel); ++v) {
      const char* rows[L];
      for (int i = 0; i < L; ++i) {
        const Stored* row = base + query_token(panel, v * L + i) * x.token;
        if constexpr (kPairs || kAsStored) {
          rows[i] = reinterpret_cast<const char*>(row);
        } else {
          widen_row(row, spare + i * steps, steps);
          rows[i] = reinterpret_cast<const char*>(spare + i * steps);
        }
      }
      int64_t l = 0;
      for (; l + L <= steps; l += L) {
        V<Real> square[L];
        for (int i = 0; i < L; ++i) square[i] = load_anywhere<Real>(rows[i] + l * sizeof(Real));
        transpose<Real>(square);
        for (int i = 0; i < L; ++i) store(to + (l + i) * kPanel + v * L, square[i]);
      }
      for (; l < steps; ++l)
        for (int i = 0; i < L; ++i)
          std::memcpy(to + l * kPanel + v * L + i, rows[i] + l * sizeof(Real), sizeof(Real));
    }
  }

  // [dims, kPanel], times a factor for each query, as a panel's rows of a tensor like the queries.
  void give_transposed(const Real* from, const Real* factor, const Tensor4& x, int64_t dims, int panel) const {
    Stored* base = head_of<Stored>(x, item_.batch, item_.head);
    for (int v = 0; v < vectors(panel); ++v) {
      int n = std::min(L, queries(panel) - v * L);
      Stored* rows[L];
      for (int i = 0; i < n; ++i) rows[i] = base + query_token(panel, v * L + i) * x.token;
      V<Real> by = load(factor + v * L);
      int64_t d = 0;
      for (; d + L <= dims; d += L) {
        V<Real> square[L];
        for (int i = 0; i < L; ++i) square[i] = load(from + (d + i) * kPanel + v * L) * by;
        transpose<Real>(square);
        for (int i = 0; i < n; ++i) narrow_row(reinterpret_cast<const Real*>(square + i), rows[i] + d, L);
      }
      for (; d < dims; ++d)
        for (int i = 0; i < n; ++i) narrow(from[d * kPanel + v * L + i] * factor[v * L + i], rows[i] + d);
    }
  }

  // ---- keys

  int64_t kv_head() const { return item_.head / (c_.heads / c_.kv_heads); }

  void visit_keys() {
    order_ = nullptr;
    if (c_.kv_order) order_ = c_.kv_order + lead(item_, c_.kv_order_batch, c_.kv_order_heads) * c_.kv_len;
    low_ = 0, high_ = c_.kv_len;
    if (c_.kv_range) {
      const int32_t* range = c_.kv_range + 2 * std::min(item_.batch, c_.kv_range_batch - 1);
      low_ = std::max<int64_t>(0, range[0]), high_ = std::min<int64_t>(c_.kv_len, range[1]);
    }
    count_ = 0, limited_ = false;
    const int64_t* row = c_.indptr + lead(item_, c_.blocks_batch, c_.blocks_heads) * (c_.rows + 1) + item_.row;
    for (int64_t i = row[0]; i < row[1]; ++i) add_block(c_.starts[i], c_.tile_ids[i]);
    if (c_.column_indptr) {
      row = c_.column_indptr + lead(item_, c_.columns_batch, c_.columns_heads) * (c_.rows + 1) + item_.row;
      for (int64_t i = row[0]; i < row[1]; ++i) add_key(c_.columns[i], nullptr);
    }
    flush();
  }

  // Whether the keys of the chunk follow one another in memory.
  bool is_run() const {
    for (int i = 1; i < count_; ++i)
      if (tokens_[i] != tokens_[0] + i) return false;
    return true;
  }

  const Call& c_;
  Item item_{};
  int64_t first_query_ = 0, queries_here_ = 0;
  int panels_ = 0;
  // The chunk: tokens of its keys and, where some query does not read some key, a word of a panel's queries for each.
  int count_ = 0;
  bool limited_ = false;
  int64_t tokens_[kKeys];
  uint64_t words_[kPanels][kKeys];

 private:
  void flush() {
    if (count_) attend_chunk();
    count_ = 0, limited_ = false;
  }

  void add_block(int64_t start, int64_t tile) {
    int64_t length = std::min(c_.block_k, c_.kv_len - start);
    // A block that fits a chunk is not cut in two where the chunk before is half full.
    if (count_ + length > kKeys && count_ >= kKeys / 2) flush();
    if (tile == 0 && !order_) {
      add_run(std::max(start, low_), std::min(start + length, high_));
    } else if (tile == 0) {
      for (int64_t i = 0; i < length; ++i) add_key(start + i, nullptr);
    } else {
      int64_t panels = (c_.block_q + kPanel - 1) / kPanel;
      const uint64_t* table = c_.tiles + (tile * panels + item_.part * kPanels) * c_.block_k;
      for (int64_t i = 0; i < length; ++i) {
        uint64_t words[kPanels], any = 0;
        for (int panel = 0; panel < kPanels; ++panel)
          any |= words[panel] = panel < panels_ ? table[panel * c_.block_k + i] & present(panel) : 0;
        // A key that no query of the item reads is not touched.
        if (any) add_key(start + i, words);
      }
    }
  }

  // Keys begin..end, whole.
  void add_run(int64_t begin, int64_t end) {
    while (begin < end) {
      if (count_ == kKeys) flush();
      int n = static_cast<int>(std::min<int64_t>(end - begin, kKeys - count_));
      for (int i = 0; i < n; ++i) tokens_[count_ + i] = begin + i;
      if (limited_) allow_all(count_, count_ + n);
      count_ += n, begin += n;
    }
  }

  // The key at a place, for the queries of `words`; null for all.
  void add_key(int64_t place, const uint64_t* words) {
    if (place < 0 || place >= c_.kv_len) return;
    int64_t token = order_ ? order_[place] : place;
    if (token < low_ || token >= high_) return;
    if (count_ == kKeys) flush();
    tokens_[count_] = token;
    if (words && !limited_) {
      allow_all(0, count_);
      limited_ = true;
    }
    if (limited_)
      for (int panel = 0; panel < kPanels; ++panel) words_[panel][count_] = words ? words[panel] : ~0ull;
    ++count_;
  }

  void allow_all(int from, int to) {
    for (int panel = 0; panel < kPanels; ++panel) std::fill(words_[panel] + from, words_[panel] + to, ~0ull);
  }

  const int64_t* order_ = nullptr;
  int64_t low_ = 0, high_ = 0;
};

// All items of one head group whose row is `split` modulo `splits`: the longest rows first.
inline void add_items(const Call& c, int64_t batch, int64_t kv_head, int64_t split, int64_t splits,
                      std::vector<Item>* found) {
  int64_t parts = (c.block_q + kPanels * kPanel - 1) / (kPanels * kPanel), group = c.heads / c.kv_heads;
  std::vector<std::pair<int64_t, Item>> rows;
  for (int64_t row = split; row < c.rows; row += splits)
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      Item item{batch, head, row, 0};
      const int64_t* at = c.indptr + lead(item, c.blocks_batch, c.blocks_heads) * (c.rows + 1) + row;
      int64_t length = (at[1] - at[0]) * c.block_k;
      if (c.column_indptr) {
        at = c.column_indptr + lead(item, c.columns_batch, c.columns_heads) * (c.rows + 1) + row;
        length += at[1] - at[0];
      }
      rows.push_back({length, item});
    }
  std::stable_sort(rows.begin(), rows.end(), [](auto& a, auto& b) { return a.first > b.first; });
  for (auto& [length, item] : rows)
    for (item.part = 0; item.part < parts; ++item.part)
      if (item.row * c.block_q + item.part * kPanels * kPanel < c.q_len) found->push_back(item);
}

}  // namespace
