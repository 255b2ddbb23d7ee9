// Tensors as kernels are handed them, and places in them.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

struct Tensor4 {
  void* data;
  int64_t batch, head, token;  // strides in elements; dims are contiguous
};

template <class Stored>
inline Stored* head_of(const Tensor4& x, int64_t batch, int64_t head) {
  return static_cast<Stored*>(x.data) + batch * x.batch + head * x.head;
}

// Place of the batch and head of an item in something whose leading sizes may be 1.
template <class Item>
inline int64_t lead(const Item& item, int64_t batch, int64_t heads) {
  return std::min(item.batch, batch - 1) * heads + std::min(item.head, heads - 1);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace
