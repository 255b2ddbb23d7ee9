// Gradients of one item of work; see cpp_block_sparse.cpp.

#pragma once

#include "cpp_block_sparse_items.h"

namespace {

// Adds to rows[i] of C vectors: the sum over n of left[i][n] * right[n], rows of `left` being kPanel apart.
template <int C, class Real>
void add_products(const Real* left, const Real* right, int64_t stride, int n, int count, Real* const* rows,
                  int64_t at) {
  constexpr int R = rows_at_once(C), L = Vec<Real>::n;
  for (int i = 0; i < count; i += R) {
    const Real* a[R];
    for (int r = 0; r < R; ++r) a[r] = left + std::min(i + r, count - 1) * kPanel;
    V<Real> sum[R][C] = {};
    for (int l = 0; l < n; ++l) {
      V<Real> b[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) b[c] = load(right + l * stride + at + c * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Real x = a[r][l];
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[r][c] += x * b[c];
      }
    }
    for (int r = 0; r < R && i + r < count; ++r)
      for (int c = 0; c < C; ++c) {
        Real* to = rows[i + r] + at + c * L;
        store(to, load(to) + sum[r][c]);
      }
  }
}

// Sums are in Real whatever is stored. A key's gradient is added to by one worker alone, row after row: its order, and
// so its bits, do not depend on the threads.
template <class Real, class Stored>
class Backward final : Reader<Single<Real>, Stored> {
  using Op = Single<Real>;
  using Base = Reader<Op, Stored>;
  using Base::c_, Base::count_, Base::item_, Base::L, Base::limited_, Base::panels_, Base::tokens_, Base::vectors,
      Base::words_;

 public:
  explicit Backward(const Call& call)
      : Base(call),
        rule_(rule_of<Real>(call)),
        dims_(round_up(call.dim, Op::kDims)),
        memory_({{&queries_, kPanels * c_.dim * kPanel},
                 {&grads_, kPanels * c_.value_dim * kPanel},
                 {&query_rows_, kPanels * kPanel * c_.dim_pad},
                 {&grad_rows_, kPanels * kPanel * c_.value_dim_pad},
                 {&weights_, std::max<int64_t>((kKeys + kSlack) * kPanel, L * std::max(c_.dim, c_.value_dim))},
                 {&slopes_, (kKeys + kSlack) * kPanel},
                 {&sums_, kPanels * dims_ * kPanel},
                 {&keys_, kKeys * dims_},
                 {&values_, kKeys * c_.value_dim},
                 {&lse_, kPanels * kPanel},
                 {&shift_, kPanels * kPanel},
                 {&peak_, kPanel},
                 {&ones_, kPanel}}) {}

  bool ready() const { return memory_.ready(); }

  void run(const Item& item, int64_t split) {
    Base::begin(item);
    int64_t kv_head = ((split * c_.batch + item.batch) * c_.kv_heads + Base::kv_head()) * c_.kv_len;
    key_grads_ = static_cast<Real*>(c_.grad_k) + kv_head * c_.dim_pad;
    value_grads_ = static_cast<Real*>(c_.grad_v) + kv_head * c_.value_dim_pad;
    std::fill_n(ones_, kPanel, Real(1));
    std::fill_n(sums_, kPanels * dims_ * kPanel, Real(0));
    for (int panel = 0; panel < panels_; ++panel) take(panel);
    Base::visit_keys();
    std::fill_n(ones_, kPanel, Real(c_.scale));
    for (int panel = 0; panel < panels_; ++panel)
      Base::give_transposed(sums_ + panel * dims_ * kPanel, ones_, c_.grad_q, c_.dim, panel);
  }

 private:
  void take(int panel) {
    Base::take_transposed(c_.q, c_.dim, panel, weights_, queries_ + panel * c_.dim * kPanel);
    Base::take_transposed(c_.grad_out, c_.value_dim, panel, weights_, grads_ + panel * c_.value_dim * kPanel);
    take_rows(c_.q, c_.dim, c_.dim_pad, panel, query_rows_);
    take_rows(c_.grad_out, c_.value_dim, c_.value_dim_pad, panel, grad_rows_);
    int64_t head = (item_.batch * c_.heads + item_.head) * c_.q_len;
    const Real *lse = static_cast<const Real*>(c_.lse) + head, *shift = static_cast<const Real*>(c_.shift) + head;
    for (int i = 0; i < kPanel; ++i) {
      int64_t token = Base::query_token(panel, i);
      // Lanes without a query, and queries without a key, get weights exp(-inf) = 0.
      bool none = i >= Base::queries(panel) || lse[token] == -std::numeric_limits<Real>::infinity();
      lse_[panel * kPanel + i] = none ? std::numeric_limits<Real>::infinity() : lse[token] * Real(M_LOG2E);
      shift_[panel * kPanel + i] = shift[token];
    }
  }

  void take_rows(const Tensor4& x, int64_t dims, int64_t pad, int panel, Real* to) const {
    const Stored* base = head_of<Stored>(x, item_.batch, item_.head);
    to += panel * kPanel * pad;
    for (int i = 0; i < Base::queries(panel); ++i, to += pad) {
      widen_row(base + Base::query_token(panel, i) * x.token, to, dims);
      std::fill(to + dims, to + pad, Real(0));
    }
  }

  void attend_chunk() override {
    const Stored* key_base = head_of<Stored>(c_.k, item_.batch, Base::kv_head());
    const Stored* value_base = head_of<Stored>(c_.v, item_.batch, Base::kv_head());
    for (int i = 0; i < count_; ++i) {
      key_[i] = keys_ + i * dims_;
      value_[i] = values_ + i * c_.value_dim;
      widen_row(key_base + tokens_[i] * c_.k.token, keys_ + i * dims_, c_.dim);
      std::fill(keys_ + i * dims_ + c_.dim, keys_ + (i + 1) * dims_, Real(0));
      widen_row(value_base + tokens_[i] * c_.v.token, values_ + i * c_.value_dim, c_.value_dim);
    }
    for (int panel = 0; panel < panels_; ++panel) {
      int first = 0, end = count_;
      const uint64_t* words = limited_ ? words_[panel] : nullptr;
      if (words) {
        while (first < end && !words[first]) ++first;
        while (first < end && !words[end - 1]) --end;
      }
      if (first < end) attend(panel, words, first, end);
    }
  }

  void attend(int panel, const uint64_t* words, int first, int end) {
    const Real *queries = queries_ + panel * c_.dim * kPanel, *grads = grads_ + panel * c_.value_dim * kPanel;
    int n = vectors(panel), here = Base::queries(panel);
    by_width(n, [&](auto c, int v) {
      int at = v * L;
      logits<Op, c>(key_, words, at, first, end, queries + at, c_.dim, rule_, weights_ + at, peak_ + at);
      logits<Op, c>(value_, nullptr, at, first, end, grads + at, c_.value_dim, Rule<Real>{1, 0, 0}, slopes_ + at,
                    peak_ + at);
    });
    for (int v = 0; v < n; ++v) differentiate(panel, v * L, first, end);
    by_width(n, [&](auto c, int v) {
      int at = v * L;
      add_values<Op, c>(keys_, dims_, slopes_ + at, first, end, dims_, ones_ + at,
                        sums_ + panel * dims_ * kPanel + at);
    });
    Real *key_rows[kKeys], *value_rows[kKeys];
    for (int i = first; i < end; ++i) {
      key_rows[i] = key_grads_ + tokens_[i] * c_.dim_pad;
      value_rows[i] = value_grads_ + tokens_[i] * c_.value_dim_pad;
    }
    by_width(static_cast<int>(c_.dim_pad / L), [&](auto c, int v) {
      add_products<c, Real>(slopes_ + first * kPanel, query_rows_ + panel * kPanel * c_.dim_pad, c_.dim_pad, here,
                            end - first, key_rows + first, v * L);
    });
    by_width(static_cast<int>(c_.value_dim_pad / L), [&](auto c, int v) {
      add_products<c, Real>(weights_ + first * kPanel, grad_rows_ + panel * kPanel * c_.value_dim_pad,
                            c_.value_dim_pad, here, end - first, value_rows + first, v * L);
    });
  }

  // Logits to weights, and gradients of the weights to those of the logits before `scale`; both in place.
  void differentiate(int panel, int at, int first, int end) {
    V<Real> lse = load(lse_ + panel * kPanel + at), shift = load(shift_ + panel * kPanel + at);
    for (int i = first; i < end; ++i) {
      Real *weight = weights_ + i * kPanel + at, *slope = slopes_ + i * kPanel + at;
      V<Real> logit = load(weight), p = power_of_two(logit - lse), grad = p * (load(slope) - shift);
      if (rule_.cap != 0) {
        V<Real> share = logit / rule_.cap;
        grad *= 1 - share * share;
      }
      store(weight, p);
      // A weight of zero passes nothing on, whatever it is multiplied with.
      store(slope, p == 0 ? p : grad);
    }
  }

  Rule<Real> rule_;
  int64_t dims_;
  Real *queries_, *grads_, *query_rows_, *grad_rows_, *weights_, *slopes_, *sums_, *keys_, *values_, *lse_, *shift_,
      *peak_, *ones_;
  Memory<Real> memory_;
  const Real *key_[kKeys], *value_[kKeys];
  Real *key_grads_ = nullptr, *value_grads_ = nullptr;
};

}  // namespace
