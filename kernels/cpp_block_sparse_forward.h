// Output and log-sum-exp of one item of work; see cpp_block_sparse.cpp.

#pragma once

#include "cpp_block_sparse_items.h"

namespace {

template <class Op, class Stored>
class Forward : protected Reader<Op, Stored> {
 protected:
  using Base = Reader<Op, Stored>;
  using typename Base::Element;
  using typename Base::Real;
  using Base::c_, Base::count_, Base::item_, Base::kAsStored, Base::kPairs, Base::L, Base::limited_, Base::panels_,
      Base::tokens_, Base::vectors, Base::words_;
  static constexpr Real kNothing = -std::numeric_limits<Real>::infinity();

 public:
  // `group`: keys from a multiple of which a part of a chunk begins.
  explicit Forward(const Call& call, int group = Op::kStep)
      : Base(call),
        group_(group),
        rule_(rule_of<Real>(call)),
        steps_((call.dim + Op::kStep - 1) / Op::kStep),
        dims_(round_up(call.value_dim, Op::kDims)),
        memory_({{&queries_, kPanels * steps_ * kPanel},
                 {&logits_, std::max<int64_t>((kKeys + kSlack) * kPanel, L * steps_)},
                 {&sums_, kPanels * dims_ * kPanel},
                 {&keys_, kPairs || kAsStored ? 0 : kKeys * c_.dim},
                 {&values_, kKeys * dims_},
                 {&peaks_, kPanels * kPanel},
                 {&totals_, kPanels * kPanel},
                 {&peak_, kPanel},
                 {&decay_, kPanel}}) {}

  bool ready() const { return memory_.ready(); }

  void run(const Item& item) {
    Base::begin(item);
    for (int panel = 0; panel < panels_; ++panel)
      Base::take_transposed(c_.q, steps_, panel, logits_, queries_ + panel * steps_ * kPanel);
    std::fill_n(peaks_, kPanels * kPanel, kNothing);
    std::fill_n(totals_, kPanels * kPanel, Real(0));
    std::fill_n(sums_, kPanels * dims_ * kPanel, Real(0));
    Base::visit_keys();
    for (int panel = 0; panel < panels_; ++panel) give(panel);
  }

 protected:
  void attend_chunk() override {
    take_chunk();
    for (int panel = 0; panel < panels_; ++panel) {
      int n = vectors(panel);
      if (!limited_) {
        attend(panel, 0, n, nullptr, 0, count_);
        continue;
      }
      // Half a panel at a time: of a diagonal block little more is computed than is kept.
      const uint64_t* words = words_[panel];
      constexpr int half = std::max(1, kPanel / 2 / L);
      for (int v = 0; v < n; v += half) {
        int to = std::min(n, v + half), first = 0, end = count_;
        uint64_t here = (to * L == 64 ? ~0ull : (1ull << to * L) - 1) & ~((1ull << v * L) - 1);
        while (first < end && !(words[first] & here)) ++first;
        while (first < end && !(words[end - 1] & here)) --end;
        if (first < end) attend(panel, v, to, words, first / group_ * group_, end);
      }
    }
  }

  // Where keys and values of the chunk are read from.
  virtual void take_chunk() {
    const Stored* base = head_of<Stored>(c_.k, item_.batch, Base::kv_head());
    for (int i = 0; i < count_; ++i) {
      const Stored* row = base + tokens_[i] * c_.k.token;
      if constexpr (kPairs || kAsStored) {
        keys_at_[i] = reinterpret_cast<const Element*>(row);
      } else {
        keys_at_[i] = keys_ + i * c_.dim;
        widen_row(row, keys_ + i * c_.dim, c_.dim);
      }
    }
    values_at_ = take_values();
  }

  // Values of the chunk's keys one after another, in pairs where two are multiplied at a time: a stride of whole heads
  // would put them all in a few sets of the cache.
  const Element* take_values() {
    const Stored* base = head_of<Stored>(c_.v, item_.batch, Base::kv_head());
    if constexpr (kAsStored)
      if (c_.v.token == dims_ && dims_ == c_.value_dim && Base::is_run()) return base + tokens_[0] * dims_;
    if constexpr (kPairs) {
      uint32_t* to = reinterpret_cast<uint32_t*>(values_);
      for (int i = 0; i < count_; i += 2, to += dims_) {
        const Stored* a = base + tokens_[i] * c_.v.token;
        // The last of an odd number stands beside zeros.
        const Stored* b = i + 1 < count_ ? base + tokens_[i + 1] * c_.v.token : nullptr;
        for (int64_t d = 0; d < c_.value_dim; ++d)
          to[d] = a[d].bits | (b ? static_cast<uint32_t>(b[d].bits) << 16 : 0u);
        std::fill(to + c_.value_dim, to + dims_, 0u);
      }
    } else {
      for (int i = 0; i < count_; ++i) {
        Real* to = values_ + i * dims_;
        widen_row(base + tokens_[i] * c_.v.token, to, c_.value_dim);
        std::fill(to + c_.value_dim, to + dims_, Real(0));
      }
    }
    return reinterpret_cast<const Element*>(values_);
  }

  // Vectors left..right of a panel's queries over keys first..end of the chunk.
  virtual void attend(int panel, int left, int right, const uint64_t* words, int first, int end) {
    const Real* queries = queries_ + panel * steps_ * kPanel;
    Real* sums = sums_ + panel * dims_ * kPanel;
    std::copy_n(peaks_ + panel * kPanel, kPanel, peak_);
    by_width(right - left, [&](auto c, int v) {
      int at = (left + v) * L;
      logits<Op, c>(keys_at_, words, at, first, end, queries + at, steps_, rule_, logits_ + at, peak_ + at);
    });
    for (int v = left; v < right; ++v) weigh(panel, v * L, first, end);
    int from = first / Op::kStep, to = (end + Op::kStep - 1) / Op::kStep;
    by_width(right - left, [&](auto c, int v) {
      int at = (left + v) * L;
      add_values<Op, c>(values_at_, dims_, logits_ + at, from, to, dims_, decay_ + at, sums + at);
    });
  }

  // Logits times `scale` to weights, in place; pairs of keys become pairs of bfloat16.
  void weigh(int panel, int at, int first, int end, Real scale = 1) {
    Real *peak = peaks_ + panel * kPanel + at, *total = totals_ + panel * kPanel + at;
    V<Real> before = load(peak), now = load(peak_ + at);
    store(peak, now);
    // Where no key was read yet the peak is -inf: 0 instead gives weights 0, not NaN.
    V<Real> shift = now == kNothing ? splat<Real>(0) : now;
    V<Real> factor = power_of_two(before - shift);
    store(decay_ + at, factor);
    V<Real> sum = load(total) * factor;
    Real* row = logits_ + at;
    if constexpr (kPairs) {
      typedef uint32_t U __attribute__((vector_size(VECTOR_BYTES)));
      for (int i = first; i < end; i += 2) {
        V<Real> a = power_of_two(load(row + i * kPanel) * scale - shift), b = splat<Real>(0);
        if (i + 1 < end) b = power_of_two(load(row + (i + 1) * kPanel) * scale - shift);
        sum += a + b;
        // Rounded to nearest: weights are never negative.
        U low = ((U)a + 0x8000u) >> 16, high = ((U)b + 0x8000u) & 0xffff0000u;
        store(row + i / 2 * kPanel, (V<Real>)(low | high));
      }
    } else {
      for (int i = first; i < end; ++i) {
        V<Real> a = power_of_two(load(row + i * kPanel) * scale - shift);
        sum += a;
        store(row + i * kPanel, a);
      }
    }
    store(total, sum);
  }

  void give(int panel) {
    Real* lse = static_cast<Real*>(c_.lse) + (item_.batch * c_.heads + item_.head) * c_.q_len;
    for (int i = 0; i < vectors(panel) * L; ++i) {
      Real total = totals_[panel * kPanel + i], peak = peaks_[panel * kPanel + i];
      bool none = peak == kNothing;
      decay_[i] = none ? 0 : 1 / total;
      if (i < Base::queries(panel))
        lse[Base::query_token(panel, i)] = none ? peak : (peak + std::log2(total)) * Real(M_LN2);
    }
    Base::give_transposed(sums_ + panel * dims_ * kPanel, decay_, c_.out, c_.value_dim, panel);
  }

  const int group_;
  const Element* keys_at_[kKeys];
  const Element* values_at_ = nullptr;
  Rule<Real> rule_;
  int64_t steps_, dims_;
  Real *queries_, *logits_, *sums_, *keys_, *values_, *peaks_, *totals_, *peak_, *decay_;
  Memory<Real> memory_;
};

}  // namespace
