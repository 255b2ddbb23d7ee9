// Attention of a few queries over long lists of keys on CPUs; see cpp_decode.py, which compiles it.
// Needs GCC's vector extensions and OpenMP, and nothing of torch. STORED is the type of the tensors.
//
// What limits decoding is memory: each key and value is read once, by all queries of all heads that share it. Dims
// stand in the lanes of vectors, as keys lie in memory; 16-bit numbers become float32 in registers. Lists of keys are
// cut in pieces whose number follows from the sizes of the call alone, and the pieces are merged in their order: the
// result is the same, bit for bit, for any number of threads.

#include <optional>

#include "cpp_decode_keys.h"

namespace {

// Pieces of a call, all units together: enough for many threads, few enough that merging is little work.
constexpr int64_t kPieces = 64;
constexpr int64_t kLeastKeys = 512;
// Bytes that are worth a thread.
constexpr int64_t kThreadBytes = 1 << 16;

// One piece of one unit: what its queries sum up, not yet divided, in passes of C of them. The last pass may have
// queries that are none.
template <class Stored, int C>
class Piece {
 public:
  // `queries` of a row for each head. Sums [rows, dims], peaks and totals [rows] are made of whole passes.
  Piece(const Call& call, const Sizes& sizes, const Unit& unit, int queries, float* scratch, float* sums,
        float* peaks, float* totals)
      : c_(call), sizes_(sizes), unit_(unit), each_(queries), passes_((unit.pack * queries + C - 1) / C),
        width_(sizes.value_steps * Widened<Stored>::kStep),
        query_width_(query_width(sizes)), queries_(scratch), lanes_(queries_ + passes_ * query_width_),
        logits_(lanes_ + passes_ * 2 * kLanes), sums_(sums), peaks_(peaks), totals_(totals) {
    if constexpr (kTiled<Stored>)
      if (sizes.tiles) tiles_.emplace(sizes, logits_ + kChunk * Now::kSlots);
    std::fill_n(queries_, passes_ * query_width_, 0.0f);
    std::fill_n(sums_, passes_ * C * width_, 0.0f);
    for (int pass = 0; pass < passes_; ++pass) {
      std::fill_n(lanes_ + pass * 2 * kLanes, kLanes, -std::numeric_limits<float>::infinity());
      std::fill_n(lanes_ + (pass * 2 + 1) * kLanes, kLanes, 0.0f);
    }
    for (int m = 0; m < unit.pack * queries; ++m) take_query(m);
  }

  // Numbers that `scratch` must hold for so many queries of all heads.
  static int64_t scratch(const Sizes& sizes, int queries) {
    int64_t passes = (queries + C - 1) / C, tiled = 0;
    if constexpr (kTiled<Stored>)
      if (sizes.tiles) tiled = TilePass<C>::scratch(sizes);
    return passes * (query_width(sizes) + 2 * kLanes) + kChunk * Now::kSlots + tiled;
  }

  void operator()(const Chunk<Stored>& chunk, const Chunk<Stored>* next) {
    for (int pass = 0; pass < passes_; ++pass) {
      float *peaks = lanes_ + pass * 2 * kLanes, *totals = peaks + kLanes;
      multiply(chunk, pass);
      F before = load(peaks);
      F now = larger<float>(before, Now::limit(chunk, sizes_.rule, pass * C, each_, logits_));
      F shift = now == splat<float>(-std::numeric_limits<float>::infinity()) ? splat<float>(0) : now;
      F decay = power_of_two(before - shift);
      store(peaks, now);
      store(totals, load(totals) * decay + Now::weigh(chunk.count, now, logits_));
      add_values(chunk, pass, reinterpret_cast<const float*>(&decay), next);
    }
  }

  void finish() {
    for (int pass = 0; pass < passes_; ++pass)
      for (int c = 0; c < C; ++c) {
        const float *peak = lanes_ + pass * 2 * kLanes, *total = peak + kLanes;
        peaks_[pass * C + c] = peak[c];
        totals_[pass * C + c] = 0;
        for (int lane = c; lane < kLanes; lane += Now::kSlots) totals_[pass * C + c] += total[lane];
      }
  }

 private:
  using Now = Pass<Stored, C>;
  struct None {};

  // Numbers that the queries of a pass take.
  static int64_t query_width(const Sizes& sizes) {
    return (sizes.tiles ? Now::kSlots : C) * sizes.key_steps * Product<Stored>::kParts * kLanes;
  }

  void multiply(const Chunk<Stored>& chunk, int pass) {
    const float* queries = queries_ + pass * query_width_;
    if constexpr (kTiled<Stored>)
      if (tiles_) return tiles_->products(chunk, queries, pass == 0, logits_);
    Now::products(chunk, sizes_, queries, pass == 0, logits_);
  }

  void add_values(const Chunk<Stored>& chunk, int pass, const float* decay, const Chunk<Stored>* next) {
    float* out = sums_ + pass * C * width_;
    if constexpr (kTiled<Stored>)
      if (tiles_) {
        if (pass == 0) tiles_->take_values(chunk, next);
        return tiles_->add_values(chunk, logits_, decay, out);
      }
    Now::add_values(chunk, sizes_, logits_, decay, pass == 0 ? next : nullptr, out);
  }

  void take_query(int m) {
    constexpr int kParts = Product<Stored>::kParts, kStep = Widened<Stored>::kStep;
    const Stored* row = head_of<const Stored>(c_.q, unit_.batch, unit_.head + m / each_) +
                        query_token(c_, unit_, m % each_) * c_.q.token;
    float* to = queries_ + m / C * query_width_;
    if constexpr (kTiled<Stored>)
      if (tiles_) return TilePass<C>::take_query(row, sizes_.key_steps, m % C, to);
    to += m % C * kParts * kLanes;
    for (int64_t s = 0; s < sizes_.key_steps; ++s, to += C * kParts * kLanes) {
      int64_t bytes = std::min<int64_t>(kStep, sizes_.dim - s * kStep) * sizeof(Stored);
      F parts[kParts];
      Product<Stored>::parts(raw(row + s * kStep, static_cast<int>(bytes)), parts);
      for (int p = 0; p < kParts; ++p) store(to + p * kLanes, parts[p]);
    }
  }

  const Call& c_;
  const Sizes& sizes_;
  const Unit& unit_;
  int each_, passes_;
  int64_t width_, query_width_;
  float *queries_, *lanes_, *logits_, *sums_, *peaks_, *totals_;
  std::optional<std::conditional_t<kTiled<Stored>, TilePass<C>, None>> tiles_;
};

// The widths of passes that are compiled.
template <class Call>
inline void with_width(int width, Call&& call) {
  auto is = [&](auto c) {
    if constexpr (decltype(c)::value <= kLanes)
      if (width == decltype(c)::value) call(c);
  };
  is(std::integral_constant<int, 1>{});
  is(std::integral_constant<int, 2>{});
  is(std::integral_constant<int, 3>{});
  is(std::integral_constant<int, 4>{});
  is(std::integral_constant<int, 6>{});
  is(std::integral_constant<int, 8>{});
  is(std::integral_constant<int, 16>{});
}

// As few passes as there must be, and none wider than it needs to be.
inline int pass_width(int queries) {
  int most = std::min(16, kLanes), passes = (queries + most - 1) / most, width = (queries + passes - 1) / passes;
  for (int w : {1, 2, 3, 4, 6, 8, 16})
    if (w >= width) return w;
  return most;
}

// Memory of a thread that the next call finds again: fresh pages for each call would cost more than what is done.
template <int Use>
float* memory(int64_t numbers) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> held;
  static thread_local int64_t size = 0;
  if (size < numbers) {
    size = 0;
    held.reset(static_cast<float*>(std::aligned_alloc(64, round_up(numbers * sizeof(float), 4096))));
    if (held) size = numbers;
  }
  return held.get();
}

// Which entries of which unit, and where the sums of its queries stand.
struct Work {
  int64_t unit, from, to, row;
};

template <class Stored>
class Decode {
 public:
  explicit Decode(const Call& call) : c_(call), units_(units_of(call)) {
    constexpr int kStep = Widened<Stored>::kStep;
    sizes_ = {c_.dim, c_.value_dim, (c_.dim + kStep - 1) / kStep, (c_.value_dim + kStep - 1) / kStep,
              c_.k.token,
              // Powers of two instead of e: their logits are larger by log2(e).
              {static_cast<float>(c_.scale * M_LOG2E), static_cast<float>(c_.softcap * M_LOG2E),
               static_cast<float>(c_.softcap != 0 ? 2 * c_.scale / c_.softcap * M_LOG2E : 0)},
              false};
    if constexpr (kTiled<Stored>) sizes_.tiles = TilePass<1>::takes(c_.dim, c_.value_dim);
    width_ = sizes_.value_steps * kStep;
    int64_t total = 0, keys = entry_keys(c_);
    for (const Unit& unit : units_) total += unit.entries * keys;
    int64_t piece = std::max(kLeastKeys, round_up((total + kPieces - 1) / kPieces, kChunk));
    int64_t entries = std::max<int64_t>(1, piece / keys);
    for (size_t u = 0; u < units_.size(); ++u) {
      first_.push_back(work_.size());
      for (int64_t from = 0; from < units_[u].entries; from += entries) {
        work_.push_back({static_cast<int64_t>(u), from, std::min(from + entries, units_[u].entries), rows_});
        rows_ += rows(units_[u]);
      }
    }
    first_.push_back(work_.size());
    int64_t bytes = total * (c_.dim + c_.value_dim) * sizeof(Stored);
    threads_ = std::min<int64_t>({c_.threads, static_cast<int64_t>(work_.size()), 1 + bytes / kThreadBytes});
  }

  bool run() {
    sums_ = memory<0>(rows_ * (width_ + 2));
    if (!sums_) return false;
    peaks_ = sums_ + rows_ * width_, totals_ = peaks_ + rows_;
    std::atomic<bool> failed{false};
    int64_t n = work_.size(), units = units_.size();
    if (threads_ <= 1) {
      for (int64_t i = 0; i < n; ++i)
        if (!attend(work_[i])) return false;
      for (int64_t u = 0; u < units; ++u) merge(u);
      return true;
    }
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < n; ++i)
        if (!attend(work_[i])) failed = true;
#pragma omp for schedule(static)
      for (int64_t u = 0; u < units; ++u) merge(u);
    }
    return !failed;
  }

 private:
  // Queries of a row of a unit's heads.
  int queries(const Unit& unit) const {
    return static_cast<int>(c_.indptr ? std::min(c_.block_q, c_.q_len - unit.row * c_.block_q) : c_.q_len);
  }
  // What is stored of a unit: whole passes.
  int rows(const Unit& unit) const {
    int n = static_cast<int>(unit.pack) * queries(unit), width = pass_width(n);
    return (n + width - 1) / width * width;
  }

  bool attend(const Work& work) {
    const Unit& unit = units_[work.unit];
    int n = static_cast<int>(unit.pack) * queries(unit);
    Sizes sizes = sizes_;
    sizes.tiles = is_tiled(n);
    bool ready = false;
    with_width(pass_width(n), [&](auto c) {
      using Here = Piece<Stored, decltype(c)::value>;
      float* scratch = memory<1>(Here::scratch(sizes, n));
      if (!scratch) return;
      Here piece(c_, sizes, unit, queries(unit), scratch, sums_ + work.row * width_, peaks_ + work.row,
                 totals_ + work.row);
      Keys<Stored, Here>(c_, unit, piece).visit(work.from, work.to);
      piece.finish();
      ready = true;
    });
    return ready;
  }

  // Fewer queries leave most of a tile empty.
  bool is_tiled(int queries) const { return sizes_.tiles && queries > 4; }

  // Where a number stands within its step that is in a lane of a part of a sum of a unit with so many queries.
  int place(int queries, int part, int lane) const {
    if constexpr (kTiled<Stored>)
      if (is_tiled(queries)) return TilePass<1>::place(part, lane);
    return Widened<Stored>::place(part, lane);
  }

  // The pieces of a unit in their order.
  void merge(int64_t u) const {
    constexpr int kStep = Widened<Stored>::kStep, kParts = Widened<Stored>::kParts;
    const Unit& unit = units_[u];
    int each = queries(unit), n = static_cast<int>(unit.pack) * each;
    int64_t begin = first_[u], end = first_[u + 1];
    std::vector<float> sum(2 * width_);
    float* in_order = sum.data() + width_;
    for (int m = 0; m < n; ++m) {
      float top = -std::numeric_limits<float>::infinity(), total = 0;
      for (int64_t i = begin; i < end; ++i) top = std::max(top, peaks_[work_[i].row + m]);
      float shift = top == -std::numeric_limits<float>::infinity() ? 0 : top;
      std::fill_n(sum.data(), width_, 0.0f);
      for (int64_t i = begin; i < end; ++i) {
        float factor = std::exp2(peaks_[work_[i].row + m] - shift);
        total += factor * totals_[work_[i].row + m];
        const float* part = sums_ + (work_[i].row + m) * width_;
        for (int64_t d = 0; d < width_; ++d) sum[d] += factor * part[d];
      }
      float divisor = total == 0 ? 1 : 1 / total;
      for (int64_t s = 0; s < width_; s += kStep)
        for (int p = 0; p < kParts; ++p)
          for (int l = 0; l < kLanes; ++l) in_order[s + place(n, p, l)] = sum[s + p * kLanes + l] * divisor;
      int64_t head = unit.head + m / each, token = query_token(c_, unit, m % each);
      narrow_row(in_order, head_of<Stored>(c_.out, unit.batch, head) + token * c_.out.token, c_.value_dim);
      c_.lse[(unit.batch * c_.heads + head) * c_.q_len + token] =
          static_cast<float>((top + std::log2(total)) * M_LN2);
    }
  }

  const Call& c_;
  std::vector<Unit> units_;
  std::vector<Work> work_;
  std::vector<int64_t> first_;  // piece of each unit
  Sizes sizes_;
  int64_t width_, rows_ = 0, threads_;
  float *sums_, *peaks_, *totals_;
};

}  // namespace

extern "C" {

// sizeof(Call), by which a caller checks that it means the same.
int64_t hsa_call_bytes() { return sizeof(Call); }

// 0, or 1 where there is no memory.
int64_t hsa_run(const Call* call) { return Decode<STORED>(*call).run() ? 0 : 1; }
}
