// The policy-gradient loss over tokens: a first look counts the valid ones, then one pass sums the loss and its statistics and
// writes the gradients, over what the loss is divided by. fastllm/ops/_ppo_loss.py holds the definition.
//
// Tokens are worked on in segments that no two rows share where rows matter: where the loss averages over sequences, where
// the ratio is one a sequence, or where an advantage is. Inside a segment all is fp32, a block at a time; across blocks sums are
// fp64, in an order that depends on shapes and mask alone. What lies between blocks is masked, padding for the most part, and is
// not read.
#include "ppo_loss.h"

#include <numeric>

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

static constexpr int64_t BLOCK = 512;
static constexpr float BOUND = 20.f;  // of a log-ratio

// x where the token is valid, else 0: what stands under the mask goes no further.
inline Vec keep(Vec valid, Vec x) { return where_less(Vec(0.f), valid, x, Vec(0.f)); }
// x where lowest <= x <= highest, the nearer end elsewhere; NaN stays.
inline Vec clamp(Vec x, Vec lowest, Vec highest) { return min(highest, max(lowest, x)); }
inline Vec negative(Vec x) { return Vec(0.f) - x; }

// A block of tokens: which are valid, and its columns as fp32, in place or converted.
struct Block {
  const PpoLoss& p;
  PpoStretch upcoming;
  int64_t row, at = 0, n = 0, ahead = 0, ahead_n = 0;  // this block: at .. at + n; the next one wanted: ahead_n from at + ahead
  bool more;
  alignas(64) float valid[BLOCK];
  alignas(64) float room[4][BLOCK];

  Block(const PpoLoss& p, int64_t begin, int64_t end, int64_t row)
      : p(p), upcoming{p.mask, begin, end}, row(row), more(upcoming.next(BLOCK)) {}
  bool next() {
    if (!more) return false;
    at = upcoming.at, n = upcoming.n;
    more = upcoming.next(BLOCK);
    PpoStretch beyond{p.mask, upcoming.end, p.tokens};  // a thread goes on where this stretch of tokens ends
    const PpoStretch* coming = more ? &upcoming : beyond.next(BLOCK) ? &beyond : nullptr;
    ahead = coming ? coming->at - at : 0, ahead_n = coming ? coming->n : 0;
    for (int64_t j = n; j < ahead_n; j += 16) prefetch(j);  // a longer block than this, whose loads will not call for all of it
    for (int64_t j = 0; j < n; ++j) valid[j] = p.mask[at + j] ? 1.f : 0.f;
    return true;
  }
  const float* column(const PpoColumn& c, int place) {
    if (!c.by_row && c.dtype == Dtype::f32) return (const float*)c.data + at;
    float* out = room[place];
    dispatch(c.dtype, [&](auto t) {
      const auto* from = (const decltype(t)*)c.data;
      if (c.by_row) {
        std::fill_n(out, n, to_float(from[row]));
      } else {
        for_each_vector(n, [&](int64_t j, int lanes) { store(out + j, FASTLLM_ISA::load(from + at + j, lanes), lanes); });
      }
    });
    return out;
  }
  // A load, and word to the cache of the next block's, which the processor cannot foresee where masked tokens lie between.
  Vec load(const float* column, int64_t j, int lanes) const {
    __builtin_prefetch(column + j + (j < ahead_n ? ahead : 0));
    return FASTLLM_ISA::load(column + j, lanes);
  }
  void prefetch(int64_t j) const {  // of the next block, of each column that is read in place, the line of token j
    for (const PpoColumn* c : {&p.logprobs, &p.old_logprobs, &p.advantages, &p.values, &p.old_values, &p.returns, &p.entropy,
                               &p.ref_logprobs, &p.weights}) {
      if (c->data && !c->by_row && c->dtype == Dtype::f32) __builtin_prefetch((const float*)c->data + at + ahead + j);
    }
  }
  double sum_valid() const {
    Vec total = 0.f;
    for_each_vector(n, [&](int64_t j, int lanes) { total += FASTLLM_ISA::load(valid + j, lanes); });
    return total.sum();
  }
};

static void add(PpoSums& to, const PpoSums& part) {
  if (part.count == 0) return;
  // Chan's update of sums of squared distances, from the means of both parts.
  const double both = to.count + part.count, share = to.count / both * part.count;
  const double apart_r = to.count ? part.returns / part.count - to.returns / to.count : 0;
  const double apart_e = to.count ? part.errors / part.count - to.errors / to.count : 0;
  to.spread_returns += part.spread_returns + share * apart_r * apart_r;
  to.spread_errors += part.spread_errors + share * apart_e * apart_e;
  to.highest = std::max(to.highest, part.highest);
  to.count = both;
  to.policy += part.policy, to.value += part.value, to.entropy += part.entropy, to.kl += part.kl;
  to.difference += part.difference, to.k3 += part.k3, to.clipped += part.clipped, to.value_clipped += part.value_clipped;
  to.ratio += part.ratio, to.advantages += part.advantages, to.returns += part.returns, to.values += part.values;
  to.errors += part.errors;
}

// A token's policy loss, its derivative by the log-ratio (for ppo) or the log-probability, and 1 where it was clipped.
template <int64_t VARIANT, bool DUAL>
struct Policy {
  Vec lowest, highest, dual_clip;
  explicit Policy(const PpoLoss& p) : lowest(p.lowest), highest(p.highest), dual_clip(p.dual_clip) {}

  void operator()(Vec a, Vec logp, Vec ratio, Vec& loss, Vec& slope, Vec& clipped) const {
    const Vec kept = clamp(ratio, lowest, highest), minus_a = negative(a);
    if constexpr (VARIANT == ppo) {
      const Vec free = minus_a * ratio, cut = minus_a * kept;
      clipped = where_less(free, cut, Vec(1.f), Vec(0.f));
      loss = max(free, cut);
      slope = where_less(free, cut, Vec(0.f), free);
      if constexpr (DUAL) {
        const Vec most = where_less(a, Vec(0.f), minus_a * dual_clip, Vec(std::numeric_limits<float>::infinity()));
        slope = where_less(most, loss, Vec(0.f), slope);
        loss = where_less(most, loss, most, loss);
      }
    } else {
      slope = VARIANT == cispo ? minus_a * kept : minus_a;
      loss = slope * logp;
      const Vec cut = where_less(kept, ratio, Vec(1.f), where_less(ratio, kept, Vec(1.f), Vec(0.f)));
      clipped = VARIANT == cispo ? cut : Vec(0.f);
    }
  }
};

template <class F>
static void with_policy(const PpoLoss& p, F&& f) {
  if (p.variant == cispo) return f(Policy<cispo, false>(p));
  if (p.variant == reinforce) return f(Policy<reinforce, false>(p));
  return p.dual_clip ? f(Policy<ppo, true>(p)) : f(Policy<ppo, false>(p));
}

static int64_t count_valid(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t at = 0; at < n; at += 4096) {
    int32_t some = 0;
    for (int64_t j = at; j < std::min(at + 4096, n); ++j) some += mask[j] != 0;
    count += some;
  }
  return count;
}

// Valid tokens, and the sum of their log-ratios if the ratio is one a sequence.
void ppo_row_sums(const PpoLoss& p, int64_t begin, int64_t end, double* count, double* log_ratio) {
  *count += double(count_valid(p.mask + begin, end - begin));
  if (!p.by_sequence) return;
  Block block(p, begin, end, 0);
  while (block.next()) {
    const float *logp = block.column(p.logprobs, 0), *old = block.column(p.old_logprobs, 1);
    Vec total = 0.f;
    for_each_vector(block.n, [&](int64_t j, int lanes) {
      total += keep(load(block.valid + j, lanes), load(logp + j, lanes) - load(old + j, lanes));
    });
    *log_ratio += total.sum();
  }
}

// The derivative of a sequence's policy losses by its log-ratio.
double ppo_row_slope(const PpoLoss& p, int64_t begin, int64_t end, int64_t row, float log_ratio) {
  if (log_ratio > BOUND || log_ratio < -BOUND) return 0;
  Block block(p, begin, end, row);
  const Vec ratio = exp(Vec(log_ratio));
  double sum = 0;
  with_policy(p, [&](auto policy) {
    while (block.next()) {
      const float* a = block.column(p.advantages, 0);
      const float* weights = p.weights.data ? block.column(p.weights, 1) : nullptr;
      Vec total = 0.f;
      for_each_vector(block.n, [&](int64_t j, int lanes) {
        const Vec valid = load(block.valid + j, lanes);
        Vec loss, slope, clipped;
        policy(keep(valid, load(a + j, lanes)), Vec(0.f), ratio, loss, slope, clipped);
        if (weights) slope *= load(weights + j, lanes);
        total += keep(valid, slope);
      });
      sum += total.sum();
    }
  });
  return sum;
}

template <class P>
static void policy_of_block(Block& block, const PpoRow& row, const P& policy, PpoSums& sums) {
  const PpoLoss& p = block.p;
  const float *logp = block.column(p.logprobs, 0), *old = block.column(p.old_logprobs, 1);
  const float* advantages = block.column(p.advantages, 2);
  const float* weights = p.weights.data ? block.column(p.weights, 3) : nullptr;
  float* grad = p.grad_logprobs + block.at;
  const Vec row_ratio = exp(clamp(Vec(row.log_ratio), Vec(-BOUND), Vec(BOUND))), share = row.share;
  const Vec row_slope = row.slope * row.share;
  const bool one_slope = p.by_sequence && p.variant == ppo;
  Vec losses = 0.f, cut = 0.f, ratios = 0.f, highest = 0.f, differences = 0.f, k3s = 0.f, all = 0.f;
  for_each_vector(block.n, [&](int64_t j, int lanes) {
    const Vec valid = load(block.valid + j, lanes), a = keep(valid, block.load(advantages, j, lanes));
    const Vec x = keep(valid, block.load(logp, j, lanes)), d = x - keep(valid, block.load(old, j, lanes));
    Vec k3;
    const Vec token_ratio = exp(clamp(d, Vec(-BOUND), Vec(BOUND)), k3);
    const Vec ratio = p.by_sequence ? row_ratio : token_ratio;
    Vec loss, slope, clipped;
    policy(a, x, ratio, loss, slope, clipped);
    if (p.variant == ppo) {  // no gradient through a log-ratio beyond its bounds
      slope = where_less(Vec(BOUND), d, Vec(0.f), where_less(d, Vec(-BOUND), Vec(0.f), slope));
    }
    if (weights) {
      const Vec w = keep(valid, load(weights + j, lanes));
      loss *= w;
      slope *= w;
    }
    // A ratio of the sequence is one of its masked tokens, too, and 0 times one that is no number is none.
    store(grad + j, keep(valid, one_slope ? row_slope : slope * share), lanes);
    losses += loss;
    cut += keep(valid, clipped);
    all += a;
    differences += d;
    k3s += k3;
    const Vec of_valid = keep(valid, ratio);
    ratios += of_valid;
    highest = max(highest, of_valid);
  });
  sums.policy = double(losses.sum()) * row.weight;
  sums.clipped = cut.sum();
  sums.ratio = ratios.sum(), sums.highest = highest.largest(), sums.difference = differences.sum(), sums.k3 = k3s.sum();
  sums.advantages = all.sum();
}

static void kl_of_block(Block& block, const PpoRow& row, PpoSums& sums) {
  const PpoLoss& p = block.p;
  const float *logp = block.column(p.logprobs, 0), *ref = block.column(p.ref_logprobs, 1);
  float* grad = p.grad_logprobs + block.at;
  const Vec coef = p.kl_coef * row.share;
  Vec total = 0.f;
  for_each_vector(block.n, [&](int64_t j, int lanes) {
    const Vec valid = load(block.valid + j, lanes), d = keep(valid, block.load(logp, j, lanes) - block.load(ref, j, lanes));
    Vec kl = d, slope = 1.f;
    if (p.kl_estimator == k2) {
      kl = Vec(0.5f) * d * d;
      slope = d;
    } else if (p.kl_estimator == k3) {
      slope = Vec(1.f) - exp(negative(d), kl);
      slope = where_less(d * d, Vec(0.1f), d - kl, slope);
    }
    total += kl;
    if (p.kl_coef) store(grad + j, load(grad + j, lanes) + keep(valid, slope * coef), lanes);
  });
  sums.kl = double(total.sum()) * row.weight;
}

static void entropy_of_block(Block& block, const PpoRow& row, PpoSums& sums) {
  const PpoLoss& p = block.p;
  const float* entropy = block.column(p.entropy, 0);
  float* grad = p.grad_entropy + block.at;
  const Vec coef = p.entropy_coef ? -p.entropy_coef * row.share : 0.f;
  Vec total = 0.f;
  for_each_vector(block.n, [&](int64_t j, int lanes) {
    const Vec valid = load(block.valid + j, lanes);
    total += keep(valid, block.load(entropy, j, lanes));
    store(grad + j, keep(valid, coef), lanes);
  });
  sums.entropy = double(total.sum()) * row.weight;
}

static void values_of_block(Block& block, const PpoRow& row, PpoSums& sums) {
  const PpoLoss& p = block.p;
  const float *values = block.column(p.values, 0), *returns = block.column(p.returns, 1);
  const float* old = p.old_values.data ? block.column(p.old_values, 2) : nullptr;
  float* grad = p.grad_values + block.at;
  const Vec coef = p.value_coef * row.share, reach = p.value_clip;
  Vec losses = 0.f, cut = 0.f, all_v = 0.f, all_r = 0.f, all_e = 0.f, all_o = 0.f;
  for_each_vector(block.n, [&](int64_t j, int lanes) {
    const Vec valid = load(block.valid + j, lanes);
    const Vec v = keep(valid, block.load(values, j, lanes)), r = keep(valid, block.load(returns, j, lanes)), e = v - r;
    Vec loss = e * e, slope = e;
    if (old) {
      const Vec from = keep(valid, block.load(old, j, lanes)), f = clamp(v, from - reach, from + reach) - r;
      const Vec clipped = f * f;
      all_o += from;
      cut += where_less(loss, clipped, Vec(1.f), Vec(0.f));
      slope = where_less(loss, clipped, Vec(0.f), slope);
      loss = where_less(clipped, loss, loss, clipped);
    }
    losses += loss;
    all_v += v;
    all_r += r;
    all_e += e;
    store(grad + j, keep(valid, p.value_coef ? slope * coef : Vec(0.f)), lanes);
  });
  const float of_old = all_o.sum();
  // A NaN among the old values, which comparisons pass over, comes out as it does from the definition.
  sums.value = of_old == of_old ? 0.5 * double(losses.sum()) * row.weight : of_old;
  sums.value_clipped = cut.sum();
  sums.values = all_v.sum(), sums.returns = all_r.sum(), sums.errors = -double(all_e.sum());
  const Vec mean_r = float(sums.returns / sums.count), mean_e = float(-sums.errors / sums.count);
  Vec spread_r = 0.f, spread_e = 0.f;
  for_each_vector(block.n, [&](int64_t j, int lanes) {
    const Vec valid = load(block.valid + j, lanes), r = block.load(returns, j, lanes), v = block.load(values, j, lanes);
    const Vec from_mean = keep(valid, r - mean_r), error = keep(valid, (v - r) - mean_e);
    spread_r = fma(from_mean, from_mean, spread_r);
    spread_e = fma(error, error, spread_e);
  });
  sums.spread_returns = spread_r.sum(), sums.spread_errors = spread_e.sum();
}

// The sums of tokens begin.. end of one row, and their gradients.
void ppo_tokens(const PpoLoss& p, int64_t begin, int64_t end, int64_t index, const PpoRow& row, PpoSums& total) {
  Block block(p, begin, end, index);
  int64_t done = begin;
  const auto skip = [&](int64_t to) {  // to the next block: what is masked has gradient 0
    for (float* grad : {p.grad_logprobs, p.grad_values, p.grad_entropy}) {
      if (grad) std::fill(grad + done, grad + to, 0.f);
    }
  };
  with_policy(p, [&](auto policy) {
    while (block.next()) {
      skip(block.at);
      done = block.at + block.n;
      PpoSums sums = {};
      sums.count = block.sum_valid();
      policy_of_block(block, row, policy, sums);
      if (p.ref_logprobs.data) kl_of_block(block, row, sums);
      if (p.entropy.data) entropy_of_block(block, row, sums);
      if (p.values.data) values_of_block(block, row, sums);
      add(total, sums);
    }
  });
  skip(end);
}

void ppo_total(const PpoSums* parts, int64_t n, PpoSums& total) {
  for (int64_t i = 0; i < n; ++i) add(total, parts[i]);
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, ppo_row_sums, (const PpoLoss&, int64_t, int64_t, double*, double*))
FASTLLM_KERNEL(double, ppo_row_slope, (const PpoLoss&, int64_t, int64_t, int64_t, float))
FASTLLM_KERNEL(void, ppo_tokens, (const PpoLoss&, int64_t, int64_t, int64_t, const PpoRow&, PpoSums&))
FASTLLM_KERNEL(void, ppo_total, (const PpoSums*, int64_t, PpoSums&))

using Maybe = std::optional<Tensor>;

// Tokens of one row that one thread works on at a time.
struct PpoSegment { int64_t begin, end, row; };
constexpr int64_t segment_tokens = 4096;

struct PpoRows {
  std::vector<PpoSegment> segments;
  int64_t count = 0;

  void push(int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += segment_tokens) {
      segments.push_back({at, std::min(at + segment_tokens, end), count});
    }
    ++count;
  }
  // f(segment's index, segment), in parallel, as much work for each thread: a little for every token, and more for valid ones,
  // where they have been counted.
  template <class F>
  void each(int64_t tokens, const F& f, const std::vector<double>& valid = {}) const {
    const int64_t n = int64_t(segments.size()), parts = parts_for(n, 8 * tokens / std::max<int64_t>(1, n));
    const auto work = [&](int64_t i) {
      return (valid.empty() ? 0 : valid[i]) + double(segments[i].end - segments[i].begin) / 8;
    };
    double whole = 0, done = 0;
    for (int64_t i = 0; i < n; ++i) whole += work(i);
    std::vector<int64_t> first(parts + 1, n);  // part's first segment
    first[0] = 0;
    // A last segment of more than twice a part's work leaves nothing to the parts behind it.
    for (int64_t i = 0, part = 1; i < n; done += work(i++)) {
      while (part < parts && done + work(i) / 2 >= whole * double(part) / double(parts)) first[part++] = i;
    }
    parallel_parts(parts, parts, [&](int64_t part, int64_t, int64_t) {
      for (int64_t i = first[part]; i < first[part + 1]; ++i) f(i, segments[i]);
    });
  }
  // What segments found, added up by row.
  std::vector<double> sum(const std::vector<double>& found) const {
    std::vector<double> rows(count);
    for (size_t i = 0; i < segments.size(); ++i) rows[segments[i].row] += found[i];
    return rows;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss(
    Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Maybe values, Maybe old_values, Maybe returns,
    Maybe entropy, Maybe ref_logprobs, Maybe importance_weights, Maybe cu_seqlens, Maybe num_items, double items,
    double clip_low, double clip_high, double dual_clip, double value_clip, double value_coef, double entropy_coef,
    double kl_coef, int64_t kl_estimator, int64_t level, int64_t aggregation, int64_t variant) {
  mask = dense(mask);
  const int64_t tokens = mask.numel();
  std::vector<Tensor> held;  // what the columns point into
  bool by_row = false;
  const auto column = [&](const Maybe& t) -> PpoColumn {
    if (!t) return {};
    held.push_back(dense(*t));
    const bool one_a_row = t->dim() < mask.dim();
    by_row |= one_a_row;
    return {dtype_of(*t), held.back().const_data_ptr(), one_a_row};
  };
  PpoLoss p{column(logprobs), column(old_logprobs), column(advantages), column(values), column(old_values),
            column(returns), column(entropy), column(ref_logprobs), column(importance_weights)};
  p.mask = (const uint8_t*)mask.const_data_ptr();
  p.tokens = tokens;
  p.lowest = float(1 - clip_low), p.highest = float(1 + clip_high);
  p.dual_clip = float(dual_clip), p.value_clip = float(value_clip);
  p.value_coef = float(value_coef), p.entropy_coef = float(entropy_coef), p.kl_coef = float(kl_coef);
  p.kl_estimator = kl_estimator, p.variant = variant, p.by_sequence = level == 1;

  const auto gradient = [&](bool of) { return of ? fresh_float(logprobs, mask.sizes()) : fresh_float(logprobs, {0}); };
  Tensor grad_logprobs = gradient(true), grad_values = gradient(bool(values)), grad_entropy = gradient(bool(entropy));
  p.grad_logprobs = (float*)grad_logprobs.mutable_data_ptr();
  p.grad_values = values ? (float*)grad_values.mutable_data_ptr() : nullptr;
  p.grad_entropy = entropy ? (float*)grad_entropy.mutable_data_ptr() : nullptr;

  const bool over_sequences = aggregation == seq_mean_token_sum || aggregation == seq_mean_token_mean;
  PpoRows rows;
  if (!(over_sequences || p.by_sequence || by_row)) {
    rows.push(0, tokens);
  } else if (cu_seqlens) {
    for_each_sequence(*cu_seqlens, tokens, [&](int64_t begin, int64_t end) { rows.push(begin, end); });
  } else {
    const int64_t length = mask.size(mask.dim() - 1), count = mask.dim() == 2 ? mask.size(0) : 1;
    for (int64_t i = 0; i < count; ++i) rows.push(i * length, (i + 1) * length);
  }
  std::vector<PpoRow> of_row(rows.count, PpoRow{1.f, 0.f, 0.f, 0.f});
  const size_t parts = rows.segments.size();
  int64_t sequences = 0;
  std::vector<double> valid(parts), log_ratios(parts);
  const auto row_sums = FASTLLM_PICK(ppo_row_sums);
  rows.each(tokens, [&](int64_t i, const PpoSegment& s) { row_sums(p, s.begin, s.end, &valid[i], &log_ratios[i]); });
  if (over_sequences || p.by_sequence) {
    const std::vector<double> counts = rows.sum(valid);
    log_ratios = rows.sum(log_ratios);
    for (int64_t row = 0; row < rows.count; ++row) {
      if (counts[row] == 0) continue;
      ++sequences;
      if (aggregation == seq_mean_token_mean) of_row[row].weight = float(1 / counts[row]);
      of_row[row].log_ratio = float(log_ratios[row] / counts[row]);
    }
    if (p.by_sequence && variant == ppo) {
      std::vector<double> slopes(parts);
      const auto row_slope = FASTLLM_PICK(ppo_row_slope);
      rows.each(tokens, [&](int64_t i, const PpoSegment& s) {
        slopes[i] = row_slope(p, s.begin, s.end, s.row, of_row[s.row].log_ratio);
      }, valid);
      slopes = rows.sum(slopes);
      for (int64_t row = 0; row < rows.count; ++row) {
        if (counts[row] != 0) of_row[row].slope = float(slopes[row] / counts[row]);
      }
    }
  }
  double divisor;
  if (num_items) {
    divisor = *(const float*)to_float(*num_items).const_data_ptr();
  } else if (items >= 0) {
    divisor = items;
  } else {
    divisor = over_sequences ? double(sequences) : std::accumulate(valid.begin(), valid.end(), 0.0);
  }
  // A normaliser that is no number would not leave a 0 one, and is left to the backward pass.
  const float inverse = float(1 / divisor);
  const bool applied = std::isfinite(inverse) && inverse != 0;
  for (PpoRow& row : of_row) row.share = applied ? row.weight * inverse : row.weight;
  std::vector<PpoSums> found(parts);
  const auto kernel = FASTLLM_PICK(ppo_tokens);
  rows.each(tokens, [&](int64_t i, const PpoSegment& s) { kernel(p, s.begin, s.end, s.row, of_row[s.row], found[i]); }, valid);
  PpoSums sum = {};
  FASTLLM_PICK(ppo_total)(found.data(), int64_t(parts), sum);

  Tensor loss = fresh_float(logprobs, {}), stats = fresh_float(logprobs, {14}), scale = fresh_float(logprobs, {});
  const double factor = sum.count ? 1 / divisor : 0, n = std::max(sum.count, 1.0);
  double total = sum.policy;
  if (value_coef != 0) total += value_coef * sum.value;
  if (entropy_coef != 0) total -= entropy_coef * sum.entropy;
  if (kl_coef != 0) total += kl_coef * sum.kl;
  const double results[] = {
      sum.policy * factor, sum.value * factor, sum.entropy * factor, sum.kl * factor, -sum.difference / n, sum.k3 / n,
      sum.clipped / n, sum.value_clipped / n, sum.ratio / n,
      sum.ratio == sum.ratio ? sum.highest : sum.ratio,  // a maximum passes a NaN over, a sum does not
      sum.advantages / n, sum.returns / n, sum.values / n,
      sum.spread_returns != 0 ? 1 - sum.spread_errors / sum.spread_returns : 0};
  for (int i = 0; i < 14; ++i) ((float*)stats.mutable_data_ptr())[i] = float(results[i]);
  *(float*)loss.mutable_data_ptr() = float(total * factor);
  *(float*)scale.mutable_data_ptr() = applied ? 1.f : inverse;
  return {loss, stats, scale, grad_logprobs, grad_values, grad_entropy};
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("ppo_loss", TORCH_BOX(&fastllm::ppo_loss)); }
#endif  // FASTLLM_BINDING
