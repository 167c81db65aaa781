// The softmax of long rows of logits, never stored: one pass over a row for its statistics, one for its gradient. Cross
// entropy, token log-probabilities and their fused linear forms are scalar formulas around these two kernels.
//
// A logit u becomes s = softcap * tanh(logit_scale * (u + bias) / softcap) / temperature; all statistics are of s, in fp32.
#include "vec.h"

namespace fastllm {

struct SoftmaxRows {
  Dtype dtype;
  const void* logits;  // (rows, columns), rows `stride` elements apart
  int64_t columns, stride;
  const int64_t* target;  // (rows,) the class of a row; column j is class first_column + j
  int64_t first_column, ignore_index;
  const float* bias;  // (columns,); null: none
  float logit_scale, softcap, temperature;  // softcap 0: none

  bool plain() const { return !bias && logit_scale == 1.f && softcap == 0.f && temperature == 1.f; }
};

// Per-row results, each (rows,). They can be continued: over the columns of two chunks they combine exactly.
struct SoftmaxStatistics {
  float* top;           // max s
  float* sum;           // sum of exp(s - top)
  float* target_logit;  // s of the target; -inf where no chunk has had it
  float* total;         // sum of s; null: not wanted
  float* weighted;      // sum of exp(s - top) (s - top); null: not wanted
};

// What multiplies what in a row's gradient: ds_j = probability p_j + at_target [j = target] + everywhere
//                                                  - grad_entropy p_j (s_j - E_p[s]).
struct SoftmaxGradient {
  const float *top, *sum, *weighted;  // (rows,) as above; weighted may be null without grad_entropy
  const float* grad;                  // (rows,) gradient of the row's loss, `grad_stride` apart
  const float* grad_entropy;          // (rows,); null: none
  int64_t grad_stride, grad_entropy_stride;
  float grad_scale;  // multiplies grad
  int64_t vocabulary;
  float label_smoothing, z_loss;
  void* out;  // (rows, columns), rows `out_stride` apart; may be the logits themselves
  int64_t out_stride;
  bool stream;  // out is larger than the cache
};

}  // namespace fastllm

#ifdef FASTLLM_ISA
#include <algorithm>
#include <type_traits>

namespace fastllm {
namespace FASTLLM_ISA {

// A row is read a block at a time: its largest value first, then, from the L1 cache, the exponentials against it.
static constexpr int64_t BLOCK = 1024;
static constexpr float NONE = -std::numeric_limits<float>::infinity();

// e^d for d <= 0, d >= -104 or NaN; exactly 1 at 0, exactly 0 at -104. 2^r on |r| <= 1/2 to 1.1e-7.
inline Vec exp_below_zero(Vec d) {
  const Vec n = round(d * Vec(1.44269504088896341f));
  const Vec r = fma(d, Vec(-1.44269504088896341f), n);  // minus the remainder: the odd coefficients below are negated
  Vec p = -0.001326472731307149f;
  p = fma(p, r, Vec(0.009671512991189957f));
  p = fma(p, r, Vec(-0.05550733581185341f));
  p = fma(p, r, Vec(0.24022242426872253f));
  p = fma(p, r, Vec(-0.6931470036506653f));
  p = fma(p, r, Vec(1.f));
  return scale_by_power_of_two(p, n);
}
// s - top, no lower than where the exponential vanishes: exp(-inf) (-inf) then counts as 0, as in the limit. NaN stays.
inline Vec below(Vec s, Vec top) { return max(Vec(-104.f), s - top); }

// 2 W neighbouring values in whatever order is cheapest: a sum or a maximum does not mind.
template <class T>
inline void load_two(const T* p, Vec* v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bf16>) {  // one load; a bf16 in the upper half of 32 bits is that float once the rest is 0
    const __m512i pairs = _mm512_loadu_si512(p);
    v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    v[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
    return;
  }
#endif
  v[0] = Vec::load(p);
  v[1] = Vec::load(p + Vec::W);
}

struct Chain {
  const float* bias;
  float factor, inner, outer;  // s = factor (u + bias), or outer tanh(inner (u + bias))
  bool capped;
  explicit Chain(const SoftmaxRows& p)
      : bias(p.bias), factor(p.logit_scale / p.temperature), inner(p.softcap ? p.logit_scale / p.softcap : 0.f),
        outer(p.softcap / p.temperature), capped(p.softcap != 0.f) {}

  template <class T>
  Vec operator()(const T* u, int64_t j, int lanes) const {
    Vec s = load(u + j, lanes);
    if (bias) s += load(bias + j, lanes);
    return capped ? tanh(s * Vec(inner)) * Vec(outer) : s * Vec(factor);
  }
  // ds/du where the chain's result is s.
  Vec slope(Vec s) const {
    if (!capped) return factor;
    const Vec t = s * Vec(1.f / outer);
    return (Vec(1.f) - t * t) * Vec(factor);
  }
};

template <bool TOTAL, bool WEIGHTED>
struct Running {
  float top = NONE;
  Vec sum[4] = {0.f, 0.f, 0.f, 0.f};  // four chains: one would wait for its own additions
  Vec total[4] = {0.f, 0.f, 0.f, 0.f};
  Vec weighted[4] = {0.f, 0.f, 0.f, 0.f};

  void rise_to(float higher) {
    const float step = std::max(-104.f, top - higher), factor = std::exp(step);
    top = higher;
    for (int k = 0; k < 4; ++k) {
      if (WEIGHTED) weighted[k] = (weighted[k] + sum[k] * Vec(step)) * Vec(factor);
      sum[k] *= Vec(factor);
    }
  }

  // `ahead` bytes past a value lies what a later block will read: fetched while the exponentials keep the core busy.
  template <class U>
  void add(const U* s, int64_t n, int64_t ahead) {
    Vec highest[4] = {NONE, NONE, NONE, NONE};  // a NaN is dropped here and comes back through the sum
    int64_t i = 0;
    for (; i + 4 * Vec::W <= n; i += 4 * Vec::W) {
      for (int k = 0; k < 4; k += 2) {
        Vec v[2];
        load_two(s + i + k * Vec::W, v);
        highest[k] = max(v[0], highest[k]);
        highest[k + 1] = max(v[1], highest[k + 1]);
      }
    }
    for_each_vector(n - i, [&](int64_t j, int lanes) {
      highest[0] = max(keep_first(load(s + i + j, lanes), lanes, NONE), highest[0]);
    });
    const float higher = max(max(highest[0], highest[1]), max(highest[2], highest[3])).largest();
    if (higher > top) rise_to(higher);
    // Nothing but -inf and NaN so far: s - top would make NaN of a -inf that a later block turns into a plain 0.
    const Vec base = top == NONE ? 0.f : top;
    for (i = 0; i + 4 * Vec::W <= n; i += 4 * Vec::W) {
      for (int64_t b = 0; b < int64_t(4 * Vec::W * sizeof(U)); b += 64) {
        __builtin_prefetch((const char*)(s + i) + ahead + b);
      }
      Vec v[4];
      load_two(s + i, v);
      load_two(s + i + 2 * Vec::W, v + 2);
      for (int k = 0; k < 4; ++k) {
        const Vec d = below(v[k], base), e = exp_below_zero(d);
        sum[k] += e;
        if (TOTAL) total[k] += v[k];
        if (WEIGHTED) weighted[k] = fma(e, d, weighted[k]);
      }
    }
    for_each_vector(n - i, [&](int64_t j, int lanes) {
      const Vec v = load(s + i + j, lanes), d = keep_first(below(v, base), lanes, -104.f), e = exp_below_zero(d);
      sum[0] += e;
      if (TOTAL) total[0] += v;
      if (WEIGHTED) weighted[0] = fma(e, d, weighted[0]);
    });
  }

  static float together(const Vec (&v)[4]) { return ((v[0] + v[1]) + (v[2] + v[3])).sum(); }
};

// Continues a row's statistics, which hold what earlier chunks of columns gave, with these columns.
template <class T, bool PLAIN, bool TOTAL, bool WEIGHTED>
static void statistics_of_row(const SoftmaxRows& p, const SoftmaxStatistics& out, int64_t row) {
  const T* u = (const T*)p.logits + row * p.stride;
  const int64_t at = p.target[row] - p.first_column;  // of the target; may lie in another chunk
  Running<TOTAL, WEIGHTED> r;
  r.top = out.top[row];
  alignas(64) float first[Vec::W] = {};
  const auto lane0 = [&](float x) { first[0] = x; return Vec::load(first); };
  r.sum[0] = lane0(out.sum[row]);
  if (TOTAL && out.total) r.total[0] = lane0(out.total[row]);
  if (WEIGHTED && out.weighted) r.weighted[0] = lane0(out.weighted[row]);
  if constexpr (PLAIN) {
    for (int64_t i = 0; i < p.columns; i += BLOCK) r.add(u + i, std::min(BLOCK, p.columns - i), 2 * BLOCK * sizeof(T));
    if (at >= 0 && at < p.columns) out.target_logit[row] = to_float(u[at]);
  } else {
    const Chain chain(p);
    alignas(64) float s[BLOCK];
    for (int64_t i = 0; i < p.columns; i += BLOCK) {
      const int64_t n = std::min(BLOCK, p.columns - i);
      for_each_vector(n, [&](int64_t j, int lanes) { store(s + j, chain(u, i + j, lanes), lanes); });
      r.add(s, n, 0);
      if (at >= i && at < i + n) out.target_logit[row] = s[at - i];
    }
  }
  out.top[row] = r.top;
  out.sum[row] = r.together(r.sum);
  if (TOTAL && out.total) out.total[row] = r.together(r.total);
  if (WEIGHTED && out.weighted) out.weighted[row] = r.together(r.weighted);
}

void softmax_statistics(const SoftmaxRows& p, const SoftmaxStatistics& out, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto one = !p.plain()                   ? statistics_of_row<T, false, true, true>
                     : out.total && out.weighted  ? statistics_of_row<T, true, true, true>
                     : out.total                  ? statistics_of_row<T, true, true, false>
                     : out.weighted               ? statistics_of_row<T, true, false, true>
                                                  : statistics_of_row<T, true, false, false>;
    for (int64_t row = begin; row < end; ++row) {
      if (p.target[row] != p.ignore_index) one(p, out, row);
    }
  });
}

template <class T, bool PLAIN, bool ENTROPY>
static void gradient_of_row(const SoftmaxRows& p, const SoftmaxGradient& g, int64_t row) {
  const T* u = (const T*)p.logits + row * p.stride;
  T* out = (T*)g.out + row * g.out_stride;
  const bool stream_row = g.stream && uintptr_t(out) % (Vec::W * sizeof(T)) == 0;
  const auto write = [&](int64_t j, Vec v, int lanes) { stream_row ? stream(out + j, v, lanes) : store(out + j, v, lanes); };
  if (p.target[row] == p.ignore_index) {
    for_each_vector(p.columns, [&](int64_t j, int lanes) { write(j, 0.f, lanes); });
    return;
  }
  const Chain chain(p);
  const float grad = g.grad[row * g.grad_stride] * g.grad_scale;
  const float lse = g.top[row] + std::log(g.sum[row]);
  const Vec top = g.top[row];
  const float inverse = 1.f / g.sum[row];
  const Vec probability = (g.z_loss ? grad * (1.f + 2.f * g.z_loss * lse) : grad) * inverse;
  const Vec everywhere = -grad * g.label_smoothing / float(g.vocabulary);
  const float grad_entropy = ENTROPY ? g.grad_entropy[row * g.grad_entropy_stride] * inverse : 0.f;
  const Vec expected = ENTROPY ? g.weighted[row] * inverse : 0.f;  // E_p[s] - top
  const Vec entropy = -grad_entropy;

  const auto columns = [&](int64_t begin, int64_t end, Vec extra) {
    for_each_vector(end - begin, [&](int64_t k, int lanes) {
      const int64_t j = begin + k;
      const Vec s = PLAIN ? load(u + j, lanes) : chain(u, j, lanes);
      const Vec d = below(s, top), e = exp_below_zero(d);
      Vec ds = fma(e, ENTROPY ? fma(entropy, d - expected, probability) : probability, extra);
      if (!PLAIN) ds *= chain.slope(s);
      write(j, ds, lanes);
    });
  };
  const int64_t at = p.target[row] - p.first_column;
  if (at < 0 || at >= p.columns) return columns(0, p.columns, everywhere);
  const int64_t begin = at / Vec::W * Vec::W, end = std::min(begin + Vec::W, p.columns);
  alignas(64) float one_hot[Vec::W] = {};
  one_hot[at - begin] = -grad * (1.f - g.label_smoothing);
  columns(0, begin, everywhere);
  columns(begin, end, everywhere + Vec::load(one_hot));
  columns(end, p.columns, everywhere);
}

void softmax_gradient(const SoftmaxRows& p, const SoftmaxGradient& g, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    const auto one = p.plain() ? (g.grad_entropy ? gradient_of_row<T, true, true> : gradient_of_row<T, true, false>)
                               : (g.grad_entropy ? gradient_of_row<T, false, true> : gradient_of_row<T, false, false>);
    for (int64_t row = begin; row < end; ++row) one(p, g, row);
  });
  if (g.stream) stream_fence();
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, softmax_statistics, (const SoftmaxRows&, const SoftmaxStatistics&, int64_t, int64_t))
FASTLLM_KERNEL(void, softmax_gradient, (const SoftmaxRows&, const SoftmaxGradient&, int64_t, int64_t))

static constexpr int64_t no_ignore = std::numeric_limits<int64_t>::min();

// Keeps the tensors that a SoftmaxRows points into alive.
struct RowsOf {
  Tensor logits, target;
  std::optional<Tensor> bias;
  SoftmaxRows rows;

  RowsOf(const Tensor& u, const Tensor& t, const std::optional<Tensor>& b, int64_t first_column, int64_t ignore_index,
         double logit_scale, double softcap, double temperature)
      : logits(u.size(1) <= 1 || u.stride(1) == 1 ? u : torch::stable::contiguous(u)), target(torch::stable::contiguous(t)) {
    if (b) bias = to_float(*b);
    rows = {dtype_of(logits), logits.const_data_ptr(), logits.size(1), logits.stride(0),
            (const int64_t*)target.const_data_ptr(), first_column, ignore_index,
            bias ? (const float*)bias->const_data_ptr() : nullptr, float(logit_scale), float(softcap), float(temperature)};
  }
  int64_t count() const { return logits.size(0); }

  // The caller turns this into an IndexError; it must come before a kernel reads the target's logit.
  void check_targets(int64_t vocabulary) const {
    for (int64_t row = 0; row < count(); ++row) {
      const int64_t t = rows.target[row];
      STD_TORCH_CHECK((t >= 0 && t < vocabulary) || t == rows.ignore_index, "target ", t, " is out of range for ", vocabulary,
                      " classes");
    }
  }
};

// Deals rows out to the threads in turns, a few at a time: ignored rows cost nothing and tend to stand together, so one
// stretch per thread would leave some of them idle. f(part, begin, end) as in parallel_parts.
template <class F>
static void deal_rows(int64_t rows, int64_t columns, int64_t parts, const F& f) {
  const int64_t turn = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, columns));
  parallel_parts(parts, parts, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      for (int64_t b = part * turn; b < rows; b += parts * turn) f(part, b, std::min(b + turn, rows));
    }
  });
}

// The statistics of no columns at all, with which a row begins.
static void begin_rows(const SoftmaxRows& p, const SoftmaxStatistics& s, int64_t begin, int64_t end) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  for (int64_t row = begin; row < end; ++row) {
    const bool ignored = p.target[row] == p.ignore_index;
    s.top[row] = s.target_logit[row] = ignored ? 0.f : none;
    s.sum[row] = ignored ? 1.f : 0.f;
    if (s.total) s.total[row] = 0.f;
    if (s.weighted) s.weighted[row] = 0.f;
  }
}

static float* row_of(const Tensor& t, int64_t row) { return (float*)t.mutable_data_ptr() + row * t.size(1); }

// The rows of a (5, rows) tensor; those not wanted are cleared.
static SoftmaxStatistics statistics_in(const Tensor& t, bool with_total, bool with_weighted) {
  const SoftmaxStatistics s{row_of(t, 0), row_of(t, 1), row_of(t, 2), row_of(t, 3), row_of(t, 4)};
  const int64_t rows = t.size(1);
  if (!with_total) std::fill_n(s.total, rows, 0.f);
  if (!with_weighted) std::fill_n(s.weighted, rows, 0.f);
  return {s.top, s.sum, s.target_logit, with_total ? s.total : nullptr, with_weighted ? s.weighted : nullptr};
}

Tensor statistics(Tensor logits, Tensor target, std::optional<Tensor> bias, std::optional<Tensor> previous,
                  int64_t first_column, int64_t ignore_index, double logit_scale, double softcap, double temperature,
                  bool with_total, bool with_entropy) {
  const RowsOf of(logits, target, bias, first_column, ignore_index, logit_scale, softcap, temperature);
  const int64_t rows = of.count(), columns = of.rows.columns;
  Tensor out = fresh_float(logits, {5, rows});
  const SoftmaxStatistics s = statistics_in(out, with_total, with_entropy);
  if (previous) {
    torch::stable::copy_(out, *previous);
  } else {
    begin_rows(of.rows, s, 0, rows);
  }
  const auto kernel = FASTLLM_PICK(softmax_statistics);
  deal_rows(rows, columns, parts_for(rows, columns), [&](int64_t, int64_t b, int64_t e) { kernel(of.rows, s, b, e); });
  return out;
}

static void run_gradient(const RowsOf& of, const SoftmaxGradient& g) {
  const auto kernel = FASTLLM_PICK(softmax_gradient);
  const int64_t rows = of.count(), columns = of.rows.columns;
  deal_rows(rows, columns, parts_for(rows, columns), [&](int64_t, int64_t b, int64_t e) { kernel(of.rows, g, b, e); });
}
static bool streams(const Tensor& out) { return out.numel() * int64_t(out.element_size()) >= stream_bytes; }

void gradient_(Tensor logits, Tensor target, std::optional<Tensor> bias, Tensor stats, Tensor grad,
               std::optional<Tensor> grad_entropy, int64_t first_column, int64_t vocabulary, int64_t ignore_index,
               double logit_scale, double softcap, double temperature, double label_smoothing, double z_loss) {
  STD_TORCH_CHECK(logits.size(1) <= 1 || logits.stride(1) == 1, "softmax_gradient_: the last dimension must be contiguous");
  const RowsOf of(logits, target, bias, first_column, ignore_index, logit_scale, softcap, temperature);
  stats = torch::stable::contiguous(stats);
  run_gradient(of, {row_of(stats, 0), row_of(stats, 1), row_of(stats, 4), (const float*)grad.const_data_ptr(),
                    grad_entropy ? (const float*)grad_entropy->const_data_ptr() : nullptr, grad.stride(0),
                    grad_entropy ? grad_entropy->stride(0) : 0, 1.f, vocabulary, float(label_smoothing), float(z_loss),
                    logits.mutable_data_ptr(), logits.stride(0), false});
}

enum Reduction : int64_t { none, mean, sum };

// loss = (1 - smoothing) nll + smoothing (mean over classes of -log p) + z_loss lse^2 of each row that is not ignored.
// -> (loss, statistics, what the summed loss was multiplied by).
std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor target, std::optional<Tensor> num_items,
                                                 double items, int64_t ignore_index, double label_smoothing,
                                                 double z_loss, double softcap, int64_t reduction) {
  const RowsOf of(logits, target, std::nullopt, 0, ignore_index, 1, softcap, 1);
  const int64_t rows = of.count(), columns = of.rows.columns;
  of.check_targets(columns);
  Tensor stats = fresh_float(logits, {5, rows});
  Tensor loss = reduction == none ? fresh_float(logits, {rows}) : fresh_float(logits, {});
  Tensor scale = fresh_float(logits, {});
  float* losses = reduction == none ? (float*)loss.mutable_data_ptr() : nullptr;
  const SoftmaxStatistics s = statistics_in(stats, label_smoothing != 0, false);
  struct Sum { double loss = 0; int64_t rows = 0; char apart[48]; };  // a cache line each
  const int64_t parts = parts_for(rows, columns);
  std::vector<Sum> sums(parts);
  const auto kernel = FASTLLM_PICK(softmax_statistics);
  deal_rows(rows, columns, parts, [&](int64_t part, int64_t b, int64_t e) {
    begin_rows(of.rows, s, b, e);
    kernel(of.rows, s, b, e);
    for (int64_t row = b; row < e; ++row) {
      double value = 0;
      if (of.rows.target[row] != ignore_index) {
        const float log_sum = std::log(s.sum[row]), lse = s.top[row] + log_sum;
        value = log_sum + (s.top[row] - s.target_logit[row]);
        if (label_smoothing) {
          const float uniform = log_sum + (s.top[row] - s.total[row] / float(columns));
          value = (1 - label_smoothing) * value + label_smoothing * uniform;
        }
        if (z_loss) value += z_loss * double(lse) * lse;
        ++sums[part].rows;
      }
      if (losses) losses[row] = float(value);
      sums[part].loss += value;
    }
  });
  double summed = 0, factor = 1;
  int64_t kept = 0;
  for (const Sum& part : sums) { summed += part.loss; kept += part.rows; }
  if (reduction == mean) {
    const double divisor = num_items ? *(const float*)to_float(*num_items).const_data_ptr() : items >= 0 ? items : double(kept);
    factor = kept ? 1 / divisor : 0;
  }
  if (reduction != none) *(float*)loss.mutable_data_ptr() = float(kept ? summed * factor : 0);
  *(float*)scale.mutable_data_ptr() = float(factor);
  return {loss, stats, scale};
}

Tensor cross_entropy_backward(Tensor logits, Tensor target, Tensor grad_loss, Tensor stats, Tensor scale,
                              int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                              int64_t reduction) {
  const RowsOf of(logits, target, std::nullopt, 0, ignore_index, 1, softcap, 1);
  const int64_t columns = of.rows.columns;
  Tensor out = fresh_like(logits);
  const SoftmaxGradient g{row_of(stats, 0), row_of(stats, 1), nullptr, (const float*)grad_loss.const_data_ptr(), nullptr,
                          reduction == none ? grad_loss.stride(0) : 0, 0, *(const float*)scale.const_data_ptr(), columns,
                          float(label_smoothing), float(z_loss), out.mutable_data_ptr(), columns, streams(out)};
  run_gradient(of, g);
  return out;
}

// -> (log-probability of each target, entropy of each row or nothing, statistics).
std::tuple<Tensor, Tensor, Tensor> token_logprobs(Tensor logits, Tensor target, double temperature, double softcap,
                                                  bool with_entropy) {
  const RowsOf of(logits, target, std::nullopt, 0, no_ignore, 1, softcap, temperature);
  const int64_t rows = of.count(), columns = of.rows.columns;
  of.check_targets(columns);
  Tensor stats = fresh_float(logits, {5, rows});
  Tensor logprobs = fresh_float(logits, {rows}), entropy = fresh_float(logits, {with_entropy ? rows : 0});
  float *logprob = (float*)logprobs.mutable_data_ptr(), *h = (float*)entropy.mutable_data_ptr();
  const SoftmaxStatistics s = statistics_in(stats, false, with_entropy);
  const auto kernel = FASTLLM_PICK(softmax_statistics);
  deal_rows(rows, columns, parts_for(rows, columns), [&](int64_t, int64_t b, int64_t e) {
    begin_rows(of.rows, s, b, e);
    kernel(of.rows, s, b, e);
    for (int64_t row = b; row < e; ++row) {
      const float log_sum = std::log(s.sum[row]);  // sum >= 1, so a log-probability is never above 0
      logprob[row] = (s.target_logit[row] - s.top[row]) - log_sum;
      if (with_entropy) h[row] = log_sum - s.weighted[row] / s.sum[row];
    }
  });
  return {logprobs, entropy, stats};
}

Tensor token_logprobs_backward(Tensor logits, Tensor target, Tensor grad_logprobs, std::optional<Tensor> grad_entropy,
                               Tensor stats, double temperature, double softcap) {
  const RowsOf of(logits, target, std::nullopt, 0, no_ignore, 1, softcap, temperature);
  const int64_t columns = of.rows.columns;
  Tensor out = fresh_like(logits);
  const SoftmaxGradient g{row_of(stats, 0), row_of(stats, 1), row_of(stats, 4), (const float*)grad_logprobs.const_data_ptr(),
                          grad_entropy ? (const float*)grad_entropy->const_data_ptr() : nullptr, grad_logprobs.stride(0),
                          grad_entropy ? grad_entropy->stride(0) : 0, -1.f, columns, 0.f, 0.f, out.mutable_data_ptr(),
                          columns, streams(out)};
  run_gradient(of, g);
  return out;
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&fastllm::cross_entropy));
  m.impl("cross_entropy_backward", TORCH_BOX(&fastllm::cross_entropy_backward));
  m.impl("token_logprobs", TORCH_BOX(&fastllm::token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&fastllm::token_logprobs_backward));
  m.impl("softmax_statistics", TORCH_BOX(&fastllm::statistics));
  m.impl("softmax_gradient_", TORCH_BOX(&fastllm::gradient_));
}
#endif  // FASTLLM_BINDING
