// A call, its units of work, and which keys a unit reads; see cpp_decode.cpp.

#pragma once

#include "cpp_decode_tiles.h"
#include "cpp_tensors.h"

namespace {

// Mirrored by cpp_decode.py, field by field; each has 8 bytes. Exactly one of the three ways to say which keys are read
// is there: pages, a pattern (indptr), or neither: all keys, causal among the queries, which are the last tokens.
struct Call {
  Tensor4 q, k, v, out;
  float* lse;  // [batch, heads, q_len]
  int64_t threads, batch, heads, kv_heads, q_len, kv_len, dim, value_dim;
  const int64_t* first;   // [batch], first key that is read of each row, or null
  const int32_t* pages;   // [batch, lists, page_count], numbers of pages, negative for none
  int64_t lists, page_count, page_size;
  // A BlockPattern; leading sizes of its parts are 1 or batch, 1 or heads.
  const int64_t *indptr, *column_indptr, *q_order, *kv_order;
  const int32_t *starts, *tile_ids, *columns, *kv_range;
  const uint8_t* tiles;   // [tiles, block_q, block_k]
  int64_t block_q, block_k, rows, blocks_batch, blocks_heads, columns_batch, columns_heads;
  int64_t q_order_batch, q_order_heads, kv_order_batch, kv_order_heads, kv_range_batch;
  double scale, softcap;
};

// The queries of a row of `pack` heads that read the same keys, and how many entries (pages, blocks, ...) list these.
struct Unit {
  int64_t batch, head, pack, row, entries;
};

// Whether two heads of a batch row list the same in a row of blocks or columns.
template <class Listed>
bool same_list(const int64_t* a, const int64_t* b, const Listed* listed) {
  return a[1] - a[0] == b[1] - b[0] && std::memcmp(listed + a[0], listed + b[0], (a[1] - a[0]) * sizeof *listed) == 0;
}

inline bool same_keys(const Call& c, const Unit& a, const Unit& b) {
  const int64_t* rows[2];
  const Unit* units[2] = {&a, &b};
  for (int i = 0; i < 2; ++i)
    rows[i] = c.indptr + lead(*units[i], c.blocks_batch, c.blocks_heads) * (c.rows + 1) + a.row;
  if (rows[0] != rows[1] &&
      !(same_list(rows[0], rows[1], c.starts) && same_list(rows[0], rows[1], c.tile_ids)))
    return false;
  if (c.column_indptr) {
    for (int i = 0; i < 2; ++i)
      rows[i] = c.column_indptr + lead(*units[i], c.columns_batch, c.columns_heads) * (c.rows + 1) + a.row;
    if (rows[0] != rows[1] && !same_list(rows[0], rows[1], c.columns)) return false;
  }
  return (!c.kv_order || c.kv_order_heads == 1) && (!c.q_order || c.q_order_heads == 1);
}

// Token of the query at a place of a unit's row.
inline int64_t query_token(const Call& c, const Unit& unit, int64_t place) {
  place += unit.row * c.block_q;
  return c.q_order ? c.q_order[lead(unit, c.q_order_batch, c.q_order_heads) * c.q_len + place] : place;
}

// Entries of a row of a pattern: its blocks, then its columns.
inline int64_t pattern_entries(const Call& c, const Unit& unit) {
  const int64_t* at = c.indptr + lead(unit, c.blocks_batch, c.blocks_heads) * (c.rows + 1) + unit.row;
  int64_t n = at[1] - at[0];
  if (c.column_indptr) {
    at = c.column_indptr + lead(unit, c.columns_batch, c.columns_heads) * (c.rows + 1) + unit.row;
    n += at[1] - at[0];
  }
  return n;
}

inline std::vector<Unit> units_of(const Call& c) {
  std::vector<Unit> found;
  int64_t group = c.heads / c.kv_heads, pack = c.pages && c.lists == c.heads ? 1 : group;
  for (int64_t b = 0; b < c.batch; ++b) {
    if (!c.indptr) {
      int64_t entries = c.pages ? c.page_count : std::max<int64_t>(0, c.kv_len - (c.first ? c.first[b] : 0));
      for (int64_t head = 0; head < c.heads; head += pack) found.push_back({b, head, pack, 0, entries});
      continue;
    }
    for (int64_t row = 0; row < c.rows; ++row)
      for (int64_t head = 0; head < c.heads; ++head) {
        Unit unit{b, head, 1, row, 0};
        // A head of a group whose keys are those of the one before joins it.
        if (head % group != 0 && same_keys(c, found.back(), unit)) {
          ++found.back().pack;
          continue;
        }
        unit.entries = pattern_entries(c, unit);
        found.push_back(unit);
      }
  }
  return found;
}

// Keys of an entry, about: by it rows are cut in pieces.
inline int64_t entry_keys(const Call& c) { return c.pages ? c.page_size : c.indptr ? c.block_k : 1; }

// The keys of one unit in chunks, each handed to `take`.
template <class Stored, class Take>
class Keys {
 public:
  Keys(const Call& call, const Unit& unit, Take& take)
      : c_(call), unit_(unit), take_(take), low_(0), high_(call.kv_len) {
    int64_t head = unit.head / (c_.heads / c_.kv_heads);
    keys_ = head_of<const Stored>(c_.k, unit.batch, head);
    values_ = head_of<const Stored>(c_.v, unit.batch, head);
    if (c_.first) low_ = std::max<int64_t>(0, c_.first[unit.batch]);
    if (c_.kv_range) {
      const int32_t* range = c_.kv_range + 2 * std::min(unit.batch, c_.kv_range_batch - 1);
      low_ = std::max<int64_t>(low_, range[0]), high_ = std::min<int64_t>(high_, range[1]);
    }
    if (c_.kv_order) order_ = c_.kv_order + lead(unit, c_.kv_order_batch, c_.kv_order_heads) * c_.kv_len;
    if (c_.indptr) queries_ = std::min(c_.block_q, c_.q_len - unit.row * c_.block_q);
  }

  void visit(int64_t from, int64_t to) {
    if (c_.pages) visit_pages(from, to);
    else if (c_.indptr) visit_pattern(from, to);
    else visit_all(from, to);
    flush();
    if (before_->count) take_(*before_, nullptr);
  }

 private:
  void visit_all(int64_t from, int64_t to) {
    from += low_, to += low_;
    // Keys that the first of the queries sees, and those that only later ones do.
    int64_t common = std::min(to, c_.kv_len - c_.q_len + 1);
    add_run(from, common);
    for (int64_t i = std::max(from, common); i < to; ++i) add_key(i, ~0ull << (i - (c_.kv_len - c_.q_len)));
  }

  void visit_pages(int64_t from, int64_t to) {
    int64_t list = c_.lists == 1 ? 0 : c_.lists == c_.heads ? unit_.head : unit_.head / (c_.heads / c_.kv_heads);
    const int32_t* pages = c_.pages + (unit_.batch * c_.lists + list) * c_.page_count;
    for (int64_t i = from; i < to; ++i)
      if (pages[i] >= 0)
        add_run(std::max(pages[i] * c_.page_size, low_), std::min((pages[i] + 1) * c_.page_size, high_));
  }

  void visit_pattern(int64_t from, int64_t to) {
    const int64_t* at = c_.indptr + lead(unit_, c_.blocks_batch, c_.blocks_heads) * (c_.rows + 1) + unit_.row;
    int64_t blocks = at[1] - at[0], first = at[0];
    for (int64_t i = from; i < std::min(to, blocks); ++i) add_block(c_.starts[first + i], c_.tile_ids[first + i]);
    if (to <= blocks) return;
    at = c_.column_indptr + lead(unit_, c_.columns_batch, c_.columns_heads) * (c_.rows + 1) + unit_.row;
    for (int64_t i = std::max(from, blocks); i < to; ++i) add_place(c_.columns[at[0] + i - blocks], ~0ull);
  }

  void add_block(int64_t start, int64_t tile) {
    int64_t length = std::min(c_.block_k, c_.kv_len - start);
    if (tile == 0 && !order_) {
      add_run(std::max(start, low_), std::min(start + length, high_));
      return;
    }
    const uint8_t* cells = c_.tiles + tile * c_.block_q * c_.block_k;
    for (int64_t i = 0; i < length; ++i) {
      uint64_t word = 0;
      for (int64_t q = 0; q < queries_; ++q) word |= static_cast<uint64_t>(cells[q * c_.block_k + i] != 0) << q;
      // A key that no query reads is not touched.
      if (word) add_place(start + i, tile == 0 ? ~0ull : word);
    }
  }

  // The key at a place of the order.
  void add_place(int64_t place, uint64_t word) {
    if (place < 0 || place >= c_.kv_len) return;
    int64_t token = order_ ? order_[place] : place;
    if (token >= low_ && token < high_) add_key(token, word);
  }

  void add_run(int64_t begin, int64_t end) {
    while (begin < end) {
      if (chunk_->count == kChunk) flush();
      int n = static_cast<int>(std::min<int64_t>(end - begin, kChunk - chunk_->count));
      if (chunk_->limited) std::fill_n(chunk_->words + chunk_->count, n, ~0ull);
      const Stored *key = keys_ + begin * c_.k.token, *value = values_ + begin * c_.v.token;
      for (int i = chunk_->count; i < chunk_->count + n; ++i, key += c_.k.token, value += c_.v.token)
        chunk_->keys[i] = key, chunk_->values[i] = value;
      chunk_->count += n, begin += n;
    }
  }

  void add_key(int64_t token, uint64_t word) {
    if (chunk_->count == kChunk) flush();
    if (word != ~0ull && !chunk_->limited) {
      std::fill_n(chunk_->words, chunk_->count, ~0ull);
      chunk_->limited = true;
    }
    if (chunk_->limited) chunk_->words[chunk_->count] = word;
    chunk_->keys[chunk_->count] = keys_ + token * c_.k.token;
    chunk_->values[chunk_->count++] = values_ + token * c_.v.token;
  }

  // A chunk is taken when the next one is known.
  void flush() {
    if (!chunk_->count) return;
    if (before_->count) take_(*before_, chunk_);
    std::swap(before_, chunk_);
    chunk_->count = 0, chunk_->limited = false;
  }

  const Call& c_;
  const Unit& unit_;
  Take& take_;
  int64_t low_, high_, queries_ = 0;
  const Stored *keys_, *values_;
  const int64_t* order_ = nullptr;
  Chunk<Stored> chunks_[2];
  Chunk<Stored> *before_ = chunks_, *chunk_ = chunks_ + 1;
};

}  // namespace
