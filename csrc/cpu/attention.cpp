// softmax(q k) v over blocks of queries and keys, and its gradients; scores of one block at a time, in fp32.
//
// Forward: a block of queries goes over the keys it sees with an online softmax. Backward: a block of keys goes over the
// queries that see it, scores transposed (keys down, queries across), so that the statistics of the queries lie along
// the vectors; sums of keys stay in place and those of queries are kept in fp32 for a whole head.
#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>

#include "tiles.h"

namespace fastllm {

struct Strides { int64_t batch, head, token; };  // in elements; channels are contiguous

// One batch row, or one document of a packed batch.
struct AttentionSequence { int64_t batch, first_query, first_key, queries, keys; };

struct Attention {
  Dtype dtype;
  const void *q, *k, *v;
  Strides q_step, k_step, v_step;
  int64_t heads, kv_heads, channels, value_channels;
  float scale, softcap;  // softcap 0: none
  bool causal;
  int64_t window, sinks;  // window 0: none
  const float *sink_logits, *slopes;
  const uint8_t* mask;  // null: none; visible where not 0
  int64_t mask_step[4];
  void* out;
  Strides out_step;
  float *lse, *rest;  // of each softmax the logarithm of its denominator, and what rounding that to fp32 lost
  int64_t lse_batch, lse_head;
  // backward
  const void* grad_out;
  Strides grad_out_step;
  const float* grad_lse;  // laid out as lse; null: zero
  void *grad_q, *grad_k, *grad_v;
  Strides grad_q_step, grad_k_step, grad_v_step;
};

// What one thread does at a time: queries [begin, end) of a group of heads, or keys [begin, end) of a key head.
struct AttentionItem { int64_t sequence, kv_head, begin, end; };

constexpr int64_t query_block = 48, key_block = 128;                      // forward
constexpr int64_t backward_key_block = 96, backward_query_block = 192;

// The keys that query i sees: [0, sinks_end) and [lo, hi).
struct Visible { int64_t sinks_end, lo, hi; };
static inline Visible visible(const Attention& p, const AttentionSequence& s, int64_t i) {
  const int64_t position = i + s.keys - s.queries;
  const int64_t hi = p.causal ? std::clamp<int64_t>(position + 1, 0, s.keys) : s.keys;
  const int64_t lo = p.window ? std::clamp<int64_t>(position - p.window + 1, 0, hi) : 0;
  return {std::min(p.sinks, lo), lo, hi};
}

// Up to how many queries (of all heads that share a key head) it is faster to read keys where they lie than to pack them;
// packed, pairs of bf16 are multiplied at once.
static inline int64_t few_queries(Dtype dtype) { return dtype == Dtype::bf16 ? 11 : 28; }

// Floats that hold the sums of one query, its running maximum and its total.
static inline int64_t attention_row_size(int64_t value_channels) { return (value_channels + 15) / 16 * 16 + 16; }

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

constexpr float log2_e = 1.44269504088896341f;
constexpr float infinity = std::numeric_limits<float>::infinity();

// Hands out pieces of one buffer, each on a cache line of its own; with a null buffer it only counts.
struct Pieces {
  float* at;
  int64_t total = 0;
  float* floats(int64_t n) {
    float* piece = at ? at + total : nullptr;
    total += round_up(n, 16);
    return piece;
  }
};

template <class T> static T* token_of(void* base, const Strides& s, int64_t batch, int64_t head, int64_t token) {
  return (T*)base + batch * s.batch + head * s.head + token * s.token;
}
template <class T> static const T* token_of(const void* base, const Strides& s, int64_t batch, int64_t head, int64_t token) {
  return (const T*)base + batch * s.batch + head * s.head + token * s.token;
}

static void fill(float* p, int64_t begin, int64_t end, float value) {
  for (int64_t i = begin; i < end; ++i) p[i] = value;
}

// Rows as the left operand of a product: where they lie if T is multiplied as it is, else widened into `room`.
template <class T>
static const void* operand(const T* rows, int64_t step, int64_t count, int64_t channels, float* room, int64_t* unit_step) {
  if constexpr (std::is_same_v<T, typename Operand<T>::type>) {
    if (step % Operand<T>::per_unit == 0) {
      *unit_step = step / Operand<T>::per_unit;
      return rows;
    }
  }
  using U = typename Operand<T>::type;
  *unit_step = channels / Operand<T>::per_unit;
  for (int64_t r = 0; r < count; ++r) {
    U* to = (U*)(room + r * *unit_step);
    if constexpr (std::is_same_v<T, U>) std::memcpy(to, rows + r * step, size_t(channels) * sizeof(T));
    else for_each_vector(channels, [&](int64_t i, int lanes) { store(to + i, load(rows + r * step + i, lanes), lanes); });
  }
  return room;
}

static const uint8_t* mask_row(const Attention& p, const AttentionSequence& s, int64_t head, int64_t i) {
  return p.mask + s.batch * p.mask_step[0] + head * p.mask_step[1] + i * p.mask_step[2];
}

// True when the mask hides all of the keys [j, j_end) from all of the queries [i, i_end).
static bool masked(const Attention& p, const AttentionSequence& s, int64_t head, int64_t i, int64_t i_end, int64_t j,
                   int64_t j_end) {
  if (!p.mask) return false;
  if (p.mask_step[2] == 0) i_end = i + 1;
  for (; i < i_end; ++i) {
    const uint8_t* row = mask_row(p, s, head, i);
    if (p.mask_step[3] == 1) {
      uint8_t any = 0;
      for (int64_t c = j; c < j_end; ++c) any |= row[c];
      if (any) return false;
    } else {
      for (int64_t c = j; c < (p.mask_step[3] ? j_end : j + 1); ++c) {
        if (row[c * p.mask_step[3]]) return false;
      }
    }
  }
  return true;
}

// x[c] = -inf where seen[c * step] is false.
static void hide_by_mask(float* x, const uint8_t* seen, int64_t step, int64_t count) {
  if (step == 0) {
    if (count > 0 && !seen[0]) fill(x, 0, count, -infinity);
  } else if (step == 1) {
    for (int64_t c = 0; c < count; ++c) x[c] = seen[c] ? x[c] : -infinity;
  } else {
    for (int64_t c = 0; c < count; ++c) {
      if (!seen[c * step]) x[c] = -infinity;
    }
  }
}

// ---- scores to what the softmax sees ---------------------------------------------------------------------------

// Whether scores are no more than products times a positive scale: then the softmax takes them as products, and a hidden
// one is -inf before it is scaled. If not, they are bent first.
static inline bool plain(const Attention& p) { return p.softcap == 0.f && !p.slopes && p.scale > 0.f; }

// Products to scores: scaled, soft-capped, biased.
static inline Vec bend(Vec s, const Attention& p, float slope, Vec distance) {
  s = s * Vec(p.scale);
  if (p.softcap != 0.f) s = Vec(p.softcap) * tanh(s * Vec(1.f / p.softcap));
  return fma(Vec(slope), distance, s);
}
static inline Vec ramp() {
  float lanes[Vec::W];
  for (int i = 0; i < Vec::W; ++i) lanes[i] = float(i);
  return Vec::load(lanes);
}

// Products x of query i and keys [j, j_end) to weights; its running maximum (of what the softmax takes) and total, and the
// scale of what is summed already. The maximum is subtracted before anything is scaled: the largest weight is 1 exactly,
// however large the scores.
template <class W>
static void soften(const Attention& p, const AttentionSequence& s, int64_t head, int64_t i, int64_t j, int64_t j_end,
                   int64_t lanes, bool started, float* x, W* weight, float* sum, int64_t width, float& top, float& total) {
  const Visible seen = visible(p, s, i);
  const float factor = plain(p) ? p.scale * log2_e : log2_e;
  if (!plain(p)) {
    const float slope = p.slopes ? p.slopes[head] : 0.f;
    const Vec lane = ramp();
    for (int64_t c = 0; c < lanes; c += Vec::W) {
      const Vec distance = lane + Vec(float(j + c - (i + s.keys - s.queries)));
      bend(Vec::load(x + c), p, slope, distance).store(x + c);
    }
  }
  const int64_t hidden_from = std::clamp(seen.sinks_end - j, int64_t(0), lanes);
  const int64_t hidden_to = std::clamp(seen.lo - j, int64_t(0), lanes);
  fill(x, hidden_from, hidden_to, -infinity);
  fill(x, std::clamp(std::min(seen.hi, j_end) - j, int64_t(0), lanes), lanes, -infinity);
  if (p.mask) hide_by_mask(x, mask_row(p, s, head, i) + j * p.mask_step[3], p.mask_step[3], j_end - j);
  Vec most(-infinity);
  for (int64_t c = 0; c < lanes; c += Vec::W) most = max(Vec::load(x + c), most);
  const float before = top, now = std::max(before, most.largest());
  const float shift = now == -infinity ? 0.f : now;
  Vec added(0.f);
  for (int64_t c = 0; c < lanes; c += Vec::W) {
    const Vec e = exp2((Vec::load(x + c) - Vec(shift)) * Vec(factor));
    added += e;
    e.store(weight + c);
  }
  if (started && now != before) {
    const float shrink = before == -infinity ? 0.f : std::exp2((before - now) * factor);
    total *= shrink;
    for (int64_t c = 0; c < width; c += Vec::W) (Vec::load(sum + c) * Vec(shrink)).store(sum + c);
  }
  total += added.sum();
  top = now;
}

// One query's sums to its output and lse. started: whether it has sums.
template <class T>
static void finish(const Attention& p, const AttentionSequence& s, int64_t head, int64_t i, float top, float total,
                   const float* sum, bool started) {
  double most = plain(p) ? double(top) * p.scale : top, all = total, kept = 1.;
  if (p.sink_logits) {
    const double sink = p.sink_logits[head], before = most;
    most = std::max(most, sink);
    if (most != -infinity) {
      kept = before == -infinity ? 0. : std::exp(before - most);
      all = all * kept + std::exp(sink - most);
    }
  }
  const bool blind = most == -infinity && all == 0.;
  const float share = blind || !started ? 0.f : float(kept / all);
  T* out = token_of<T>(p.out, p.out_step, s.batch, head, s.first_query + i);
  for_each_vector(p.value_channels, [&](int64_t c, int lanes) {
    store(out + c, share == 0.f ? Vec(0.f) : Vec::load(sum + c) * Vec(share), lanes);
  });
  const int64_t at = s.batch * p.lse_batch + head * p.lse_head + s.first_query + i;
  const double lse = blind ? -infinity : most + std::log(all);
  p.lse[at] = float(lse);
  if (p.rest) p.rest[at] = blind ? 0.f : float(lse - double(float(lse)));
}

// ---- forward ---------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  using U = typename Operand<T>::type;
  static constexpr int per_unit = Operand<T>::per_unit;
  const Attention& p;
  int64_t units, width, longest;  // units of a query, padded channels of a value, keys of the longest sequence
  float *keys, *values, *queries, *scores, *weights, *sum, *top, *total, *packed;
  int64_t values_panel;
  AttentionItem held{-1, -1, 0, 0};
  int64_t size;

  Forward(const Attention& p, int64_t longest, float* memory) : p(p), longest(round_up(longest, key_block)) {
    units = p.channels / per_unit;
    width = round_up(p.value_channels, Vec::W);
    values_panel = this->longest / per_unit * panel;
    Pieces pieces{memory};
    keys = pieces.floats(this->longest * units);
    values = pieces.floats(round_up(p.value_channels, panel) / panel * values_panel);
    queries = pieces.floats(query_block * units);
    scores = pieces.floats(query_block * key_block);
    weights = pieces.floats(query_block * key_block / per_unit);
    sum = pieces.floats(query_block * width);
    top = pieces.floats(query_block);
    total = pieces.floats(query_block);
    packed = pieces.floats(this->longest / key_block);
    size = pieces.total;
  }

  void pack(const AttentionSequence& s, int64_t kv_head, int64_t block) {
    if (packed[block] != 0.f) return;
    packed[block] = 1.f;
    const int64_t first = block * key_block, count = std::min(key_block, s.keys - first);
    across(token_of<T>(p.k, p.k_step, s.batch, kv_head, s.first_key + first), p.k_step.token, count, p.channels,
           keys + first * units);
    along(token_of<T>(p.v, p.v_step, s.batch, kv_head, s.first_key + first), p.v_step.token, count,
          round_up(count, panel), p.value_channels, values + first / per_unit * panel, values_panel);
  }

  void run(const AttentionSequence& s, const AttentionItem& item) {
    if (held.sequence != item.sequence || held.kv_head != item.kv_head) {
      fill(packed, 0, longest / key_block, 0.f);
      held = item;
    }
    const int64_t group = p.heads / p.kv_heads;
    for (int64_t head = item.kv_head * group; head < (item.kv_head + 1) * group; ++head) {
      for (int64_t i = item.begin; i < item.end; i += query_block) {
        rows(s, item.kv_head, head, i, std::min(i + query_block, item.end));
      }
    }
  }

  void rows(const AttentionSequence& s, int64_t kv_head, int64_t head, int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    int64_t query_step = 0;
    const void* q = operand(token_of<T>(p.q, p.q_step, s.batch, head, s.first_query + begin), p.q_step.token, count,
                            p.channels, queries, &query_step);
    fill(top, 0, count, -infinity);
    fill(total, 0, count, 0.f);
    const Visible first = visible(p, s, begin), last = visible(p, s, end - 1);
    const int64_t lo = round_down(first.lo, key_block), hi = last.hi;
    bool started = false;
    const auto block = [&](int64_t j) {
      const int64_t j_end = std::min(j + key_block, hi), lanes = round_up(j_end - j, Vec::W);
      if (masked(p, s, head, begin, end, j, j_end)) return;
      pack(s, kv_head, j / key_block);
      product<per_unit>(count, lanes, units, q, query_step, 1, keys + j * units, panel * units, scores, key_block, false);
      for (int64_t r = 0; r < count; ++r) {
        soften(p, s, head, begin + r, j, j_end, lanes, started, scores + r * key_block,
               (U*)(weights + r * (key_block / per_unit)), sum + r * width, width, top[r], total[r]);
      }
      product<per_unit>(count, width, lanes / per_unit, weights, key_block / per_unit, 1, values + j / per_unit * panel,
                        values_panel, sum, width, started);
      started = true;
    };
    for (int64_t j = 0; j < std::min(std::min(p.sinks, hi), lo); j += key_block) block(j);
    for (int64_t j = lo; j < hi; j += key_block) block(j);
    for (int64_t r = 0; r < count; ++r) finish<T>(p, s, head, begin + r, top[r], total[r], sum + r * width, started);
  }
};

// ---- few queries -----------------------------------------------------------------------------------------------

// A few queries (of all heads that share a key head) over some of the keys, read where they lie: bound by the bytes of keys
// and values. Keys are split among items, whose sums are joined afterwards.
template <class T>
struct Few {
  using U = typename Operand<T>::type;
  static constexpr int per_unit = Operand<T>::per_unit;
  static constexpr int64_t block = 128, together = 4;  // keys at a time; queries whose sums share the registers
  const Attention& p;
  int64_t units, key_width, width, row_size;  // units of a query, and with room for whole vectors
  float *queries, *scores, *weights;
  int64_t size;

  Few(const Attention& p, int64_t rows, float* memory) : p(p) {
    units = p.channels / per_unit;
    key_width = round_up(units, Vec::W);
    width = round_up(p.value_channels, Vec::W);
    row_size = attention_row_size(p.value_channels);
    Pieces pieces{memory};
    queries = pieces.floats(rows * key_width);
    scores = pieces.floats(rows * block);
    weights = pieces.floats(rows * block / per_unit);
    size = pieces.total;
  }

  // joined: rows of sums, each followed by its running maximum and total.
  void run(const AttentionSequence& s, const AttentionItem& item, float* joined) {
    const int64_t group = p.heads / p.kv_heads, rows = group * s.queries;
    for (int64_t r = 0; r < rows; ++r) {
      const T* q = token_of<T>(p.q, p.q_step, s.batch, item.kv_head * group + r / s.queries, s.first_query + r % s.queries);
      U* row = (U*)(queries + r * key_width);
      if constexpr (std::is_same_v<T, U>) std::memcpy(row, q, size_t(p.channels) * sizeof(T));
      else for_each_vector(p.channels, [&](int64_t c, int lanes) { load(q + c, lanes).store(row + c); });
      fill(joined + r * row_size, 0, width, 0.f);
      joined[r * row_size + width] = -infinity, joined[r * row_size + width + 1] = 0.f;
    }
    // begin and end count visible keys: first the sinks, then the window.
    const Visible first = visible(p, s, 0), last = visible(p, s, s.queries - 1);
    const int64_t gap = first.lo - first.sinks_end;
    for (int64_t n = item.begin; n < item.end;) {
      const bool sink = n < first.sinks_end;
      const int64_t end = std::min({n + block, item.end, sink ? first.sinks_end : last.hi - gap});
      keys(s, item.kv_head, rows, sink ? n : n + gap, sink ? end : end + gap, joined);
      n = end;
    }
  }

  void keys(const AttentionSequence& s, int64_t kv_head, int64_t rows, int64_t j, int64_t j_end, float* joined) {
    const int64_t group = p.heads / p.kv_heads, count = j_end - j, lanes = round_up(count, Vec::W);
    const T* k = token_of<T>(p.k, p.k_step, s.batch, kv_head, s.first_key + j);
    const T* v = token_of<T>(p.v, p.v_step, s.batch, kv_head, s.first_key + j);
    in_groups(rows, [&](int64_t r, auto many) {
      dots<many()>(k, count, queries + r * key_width, scores + r * block, r == 0);
    });
    for (int64_t r = 0; r < rows; ++r) {
      float *x = scores + r * block, *row = joined + r * row_size;
      soften(p, s, kv_head * group + r / s.queries, r % s.queries, j, j_end, lanes, true, x, (U*)weights + r * block, row,
             width, row[width], row[width + 1]);
    }
    in_groups(rows, [&](int64_t r, auto many) {
      add<many()>(v, count, (const U*)weights + r * block, joined + r * row_size, r == 0);
    });
  }

  // Rows a block further on are asked for while these are worked on, a few at a time: the processor's own prefetching stops
  // at every page, and many requests at once would have to wait for each other.
  static void prefetch(const T* row, int64_t count) {
    for (int64_t c = 0; c < count; c += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + c, 0, 3);
  }

  template <class F>
  static void in_groups(int64_t rows, const F& f) {
    int64_t r = 0;
    for (; r + together <= rows; r += together) f(r, std::integral_constant<int, together>());
    for (; r < rows; ++r) f(r, std::integral_constant<int, 1>());
  }

  // Units of a row of keys as they are multiplied.
  static Vec units_of(const T* k, int64_t c, int lanes) {
    if constexpr (per_unit == 2) return load((const float*)k + c, lanes);
    else return load(k + c, lanes);
  }

  // x[r * block + j] of Rows queries and Keys keys.
  template <int Rows, int Keys>
  void dots_of(const T* k, const float* q, float* x) {
    Vec sum[Rows * Keys];
#pragma GCC unroll 16
    for (int n = 0; n < Rows * Keys; ++n) sum[n] = Vec(0.f);
    for_each_vector(units, [&](int64_t c, int lanes) {
      Vec key[Keys];
#pragma GCC unroll 16
      for (int j = 0; j < Keys; ++j) key[j] = units_of(k + j * p.k_step.token, c, lanes);
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vec query = load(q + r * key_width + c, lanes);
#pragma GCC unroll 16
        for (int j = 0; j < Keys; ++j) sum[r * Keys + j] = multiply_add<per_unit>(query, key[j], sum[r * Keys + j]);
      }
    });
#if defined(FASTLLM_SUMS_AT_ONCE)
    if constexpr (Rows * Keys == FASTLLM_SUMS_AT_ONCE) {
      float all[FASTLLM_SUMS_AT_ONCE];
      sums(sum).store(all);
      for (int r = 0; r < Rows; ++r) std::memcpy(x + r * block, all + r * Keys, Keys * sizeof(float));
      return;
    }
#endif
    for (int n = 0; n < Rows * Keys; ++n) x[n / Keys * block + n % Keys] = sum[n].sum();
  }

  template <int Rows>
  void dots(const T* k, int64_t count, const float* q, float* x, bool ahead) {
    int64_t j = 0;
#if defined(FASTLLM_SUMS_AT_ONCE)
    constexpr int keys = FASTLLM_SUMS_AT_ONCE / Rows;
    for (; j + keys <= count; j += keys) {
      for (int64_t n = j; ahead && n < j + keys; ++n) prefetch(k + (block + n) * p.k_step.token, p.channels);
      dots_of<Rows, keys>(k + j * p.k_step.token, q, x + j);
    }
#endif
    for (; j < count; ++j) {
      if (ahead) prefetch(k + (block + j) * p.k_step.token, p.channels);
      dots_of<Rows, 1>(k + j * p.k_step.token, q, x + j);
    }
  }

  template <int Rows>
  void add(const T* v, int64_t count, const U* weights, float* joined, bool ahead) {
    constexpr int64_t at_once = tile_vectors * Vec::W;
    int64_t c = 0;
#if defined(__AVX512BF16__)
    if constexpr (per_unit == 2) {
      for (; c + at_once <= p.value_channels; c += at_once) add_pairs<Rows>(v + c, count, weights, joined + c, ahead);
    }
#endif
    for (; c + at_once <= p.value_channels; c += at_once) {
      Vec sum[Rows][tile_vectors];
      for (int r = 0; r < Rows; ++r)
        for (int n = 0; n < tile_vectors; ++n) sum[r][n] = Vec::load(joined + r * row_size + c + n * Vec::W);
      for (int64_t j = 0; j < count; ++j) {
        const T* value = v + j * p.v_step.token + c;
        if (ahead) prefetch(value + block * p.v_step.token, at_once);
        for (int n = 0; n < tile_vectors; ++n) {
          const Vec one = Vec::load(value + n * Vec::W);
          for (int r = 0; r < Rows; ++r) sum[r][n] = fma(Vec(to_float(weights[r * block + j])), one, sum[r][n]);
        }
      }
      for (int r = 0; r < Rows; ++r)
        for (int n = 0; n < tile_vectors; ++n) sum[r][n].store(joined + r * row_size + c + n * Vec::W);
    }
    for_each_vector(p.value_channels - c, [&](int64_t rest, int lanes) {
      for (int r = 0; r < Rows; ++r) {
        float* to = joined + r * row_size + c + rest;
        Vec sum = Vec::load(to);
        for (int64_t j = 0; j < count; ++j) {
          sum = fma(Vec(to_float(weights[r * block + j])), load(v + j * p.v_step.token + c + rest, lanes), sum);
        }
        sum.store(to);
      }
    });
  }

#if defined(__AVX512BF16__)
  // 64 channels, two keys at once. Interleaving two rows leaves the channels of a pair of vectors by fours: 0-3, 8-11, ...
  // in the one and 4-7, 12-15, ... in the other.
  template <int Rows>
  void add_pairs(const T* v, int64_t count, const U* weights, float* joined, bool ahead) {
    Vec sum[Rows][4];
    for (int r = 0; r < Rows; ++r)
      for (int n = 0; n < 4; ++n) sum[r][n] = Vec(0.f);
    for (int64_t j = 0; j < count; j += 2) {
      const T *one = v + j * p.v_step.token, *two = one + p.v_step.token;
      if (ahead) prefetch(one + block * p.v_step.token, 64), prefetch(two + block * p.v_step.token, 64);
      Vec pairs[4];
      for (int n = 0; n < 2; ++n) {
        const __m512i a = _mm512_loadu_si512(one + 32 * n);
        const __m512i b = j + 1 < count ? _mm512_loadu_si512(two + 32 * n) : _mm512_setzero_si512();
        pairs[2 * n] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b));
        pairs[2 * n + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b));
      }
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const Vec weight = one_unit((const float*)(weights + r * block + j));
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) sum[r][n] = multiply_add<2>(weight, pairs[n], sum[r][n]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int n = 0; n < 4; n += 2) {
        const __m512 low = _mm512_shuffle_f32x4(sum[r][n].v, sum[r][n + 1].v, 0x44);
        const __m512 high = _mm512_shuffle_f32x4(sum[r][n].v, sum[r][n + 1].v, 0xee);
        float* to = joined + r * row_size + n * Vec::W;
        (Vec::load(to) + Vec(_mm512_shuffle_f32x4(low, low, 0xd8))).store(to);
        (Vec::load(to + Vec::W) + Vec(_mm512_shuffle_f32x4(high, high, 0xd8))).store(to + Vec::W);
      }
    }
  }
#endif

  // Joins the sums of a sequence's items, `apart` floats from each other, in order.
  void join(const AttentionSequence& s, int64_t kv_head, float* joined, int64_t parts, int64_t apart) {
    const int64_t group = p.heads / p.kv_heads;
    const float factor = plain(p) ? p.scale * log2_e : log2_e;
    for (int64_t r = 0; r < group * s.queries; ++r) {
      float *row = joined + r * row_size, most = -infinity, total = 0.f;
      for (int64_t n = 0; n < parts; ++n) most = std::max(row[n * apart + width], most);
      for (int64_t n = 0; n < parts; ++n) {
        float* part = row + n * apart;
        const float share =
            part[width] == -infinity && part[width + 1] == 0.f ? 0.f : std::exp2((part[width] - most) * factor);
        total += part[width + 1] * share;
        for (int64_t c = 0; c < width; c += Vec::W) {
          const Vec scaled = share == 0.f ? Vec(0.f) : Vec::load(part + c) * Vec(share);
          (n ? Vec::load(row + c) + scaled : scaled).store(row + c);
        }
      }
      finish<T>(p, s, kv_head * group + r / s.queries, r % s.queries, most, total, row, parts > 0);
    }
  }
};

// ---- backward --------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  using U = typename Operand<T>::type;
  static constexpr int per_unit = Operand<T>::per_unit;
  static constexpr int64_t Bk = backward_key_block, Bq = backward_query_block;
  // In fp32 the weights are to be as exact as the scores; 16 bits round more than an lse in fp32 does.
  static constexpr bool precise = std::is_same_v<T, float>;
  const Attention& p;
  int64_t units, value_units, width, value_width, queries, keys_held;
  float *q_across, *q_along, *g_across, *g_along, *k_rows, *v_rows, *k_along, *scores, *slopes_of, *weights, *dscores,
      *dscores_along, *grad_q, *grad_k, *grad_v, *lse, *rest, *delta;
  int64_t panel_size, k_panel;
  int64_t size;

  Backward(const Attention& p, int64_t longest_queries, int64_t keys_held, float* memory) : p(p), keys_held(keys_held) {
    units = p.channels / per_unit, value_units = p.value_channels / per_unit;
    width = round_up(p.channels, 16), value_width = round_up(p.value_channels, 16);
    queries = round_up(longest_queries, Bq);
    panel_size = queries / per_unit * panel;
    k_panel = Bk / per_unit * panel;
    const int64_t panels = round_up(p.channels, panel) / panel, value_panels = round_up(p.value_channels, panel) / panel;
    Pieces pieces{memory};
    q_across = pieces.floats(queries * units);
    q_along = pieces.floats(panels * panel_size);
    g_across = pieces.floats(queries * value_units);
    g_along = pieces.floats(value_panels * panel_size);
    k_rows = pieces.floats(Bk * units);
    v_rows = pieces.floats(Bk * value_units);
    k_along = pieces.floats(panels * k_panel);
    scores = pieces.floats(Bk * Bq);
    slopes_of = pieces.floats(Bk * Bq);
    weights = pieces.floats(Bk * Bq / per_unit);
    dscores = pieces.floats(Bk * Bq / per_unit);
    dscores_along = pieces.floats(Bk * Bq / per_unit);
    grad_q = pieces.floats(queries * width);
    grad_k = pieces.floats(keys_held * width);
    grad_v = pieces.floats(keys_held * value_width);
    lse = pieces.floats(queries);
    rest = pieces.floats(queries);
    delta = pieces.floats(queries);
    size = pieces.total;
  }

  // The queries that see any of the keys [j, j_end).
  std::pair<int64_t, int64_t> seen_by(const AttentionSequence& s, int64_t j, int64_t j_end) const {
    const int64_t shift = s.keys - s.queries;
    const int64_t from = p.causal ? std::clamp<int64_t>(j - shift, 0, s.queries) : 0;
    const int64_t to = p.window && j >= p.sinks ? std::clamp<int64_t>(j_end - 1 + p.window - shift, 0, s.queries) : s.queries;
    return {from, std::max(from, to)};
  }

  // partial: where to add up the queries' gradients (queries x width, fp32) if other items have a share in them; or null.
  void run(const AttentionSequence& s, const AttentionItem& item, float* partial, int64_t partial_head) {
    const int64_t group = p.heads / p.kv_heads;
    fill(grad_k, 0, (item.end - item.begin) * width, 0.f);
    fill(grad_v, 0, (item.end - item.begin) * value_width, 0.f);
    const auto [from, to_first] = seen_by(s, item.begin, item.end);
    const int64_t first = round_down(from, panel), last = to_first;
    for (int64_t head = item.kv_head * group; head < (item.kv_head + 1) * group; ++head) {
      if (last > first) prepare(s, head, first, last);
      for (int64_t j = item.begin; j < item.end; j += Bk) keys(s, item, head, j, std::min(j + Bk, item.end));
      if (partial) {
        float* to = partial + head * partial_head + s.first_query * width;
        for (int64_t i = 0; i < s.queries; ++i) {
          for (int64_t c = 0; c < width; c += Vec::W) {
            (i >= first && i < last ? Vec::load(grad_q + i * width + c) : Vec(0.f)).store(to + i * width + c);
          }
        }
      } else {
        for (int64_t i = 0; i < s.queries; ++i) {
          T* to = token_of<T>(p.grad_q, p.grad_q_step, s.batch, head, s.first_query + i);
          const bool touched = i >= first && i < last;
          for_each_vector(p.channels, [&](int64_t c, int lanes) {
            store(to + c, touched ? Vec::load(grad_q + i * width + c) * Vec(p.scale) : Vec(0.f), lanes);
          });
        }
      }
    }
    for (int64_t j = item.begin; j < item.end; ++j) {
      T* to = token_of<T>(p.grad_k, p.grad_k_step, s.batch, item.kv_head, s.first_key + j);
      T* to_value = token_of<T>(p.grad_v, p.grad_v_step, s.batch, item.kv_head, s.first_key + j);
      const float *from_k = grad_k + (j - item.begin) * width, *from_v = grad_v + (j - item.begin) * value_width;
      for_each_vector(p.channels, [&](int64_t c, int lanes) { store(to + c, Vec::load(from_k + c) * Vec(p.scale), lanes); });
      for_each_vector(p.value_channels, [&](int64_t c, int lanes) { store(to_value + c, Vec::load(from_v + c), lanes); });
    }
  }

  // Packs the queries [first, last) of a head and the gradients of their outputs, and sets their sums to zero.
  void prepare(const AttentionSequence& s, int64_t head, int64_t first, int64_t last) {
    const int64_t count = last - first, room = round_up(count, panel);
    const T* q = token_of<T>(p.q, p.q_step, s.batch, head, s.first_query + first);
    const T* g = token_of<T>(p.grad_out, p.grad_out_step, s.batch, head, s.first_query + first);
    const T* o = token_of<T>(p.out, p.out_step, s.batch, head, s.first_query + first);
    across(q, p.q_step.token, count, p.channels, q_across + first * units);
    along(q, p.q_step.token, count, room, p.channels, q_along + first / per_unit * panel, panel_size);
    across(g, p.grad_out_step.token, count, p.value_channels, g_across + first * value_units);
    along(g, p.grad_out_step.token, count, room, p.value_channels, g_along + first / per_unit * panel, panel_size);
    fill(grad_q, first * width, (first + room) * width, 0.f);
    const int64_t at = s.batch * p.lse_batch + head * p.lse_head + s.first_query + first;
    for (int64_t i = 0; i < count; ++i) {
      Vec dot(0.f);
      for_each_vector(p.value_channels, [&](int64_t c, int lanes) {
        dot = fma(load(g + i * p.grad_out_step.token + c, lanes), load(o + i * p.out_step.token + c, lanes), dot);
      });
      delta[first + i] = dot.sum() - (p.grad_lse ? p.grad_lse[at + i] : 0.f);
      const float found = p.lse[at + i];
      lse[first + i] = found == -infinity ? infinity : precise ? found : found * log2_e;  // a query that saw nothing has no weights
      rest[first + i] = p.rest[at + i] * log2_e;
    }
    fill(lse, first + count, first + room, infinity);
    fill(rest, first + count, first + room, 0.f);
    fill(delta, first + count, first + room, 0.f);
  }

  void keys(const AttentionSequence& s, const AttentionItem& item, int64_t head, int64_t j, int64_t j_end) {
    const int64_t count = j_end - j;
    const auto [from, to] = seen_by(s, j, j_end);
    if (from >= to) return;
    const T* key_rows = token_of<T>(p.k, p.k_step, s.batch, item.kv_head, s.first_key + j);
    const T* value_rows = token_of<T>(p.v, p.v_step, s.batch, item.kv_head, s.first_key + j);
    int64_t k_unit_step = 0, v_unit_step = 0;
    const void* k = operand(key_rows, p.k_step.token, count, p.channels, k_rows, &k_unit_step);
    const void* v = operand(value_rows, p.v_step.token, count, p.value_channels, v_rows, &v_unit_step);
    along(key_rows, p.k_step.token, count, round_up(count, per_unit), p.channels, k_along, k_panel);
    bent_slope = p.slopes ? p.slopes[head] : 0.f;
    for (int64_t i = round_down(from, panel); i < to; i += Bq) {
      bent_from = float(i + s.keys - s.queries - j);
      const int64_t i_end = std::min(i + Bq, to), lanes = round_up(i_end - i, Vec::W);
      if (masked(p, s, head, i, i_end, j, j_end)) continue;
      product<per_unit>(count, lanes, units, k, k_unit_step, 1, q_across + i * units, panel * units, scores, Bq, false);
      product<per_unit>(count, lanes, value_units, v, v_unit_step, 1, g_across + i * value_units, panel * value_units,
                        slopes_of, Bq, false);
      for (int64_t r = 0; r < count; r += per_unit) {
        for (int64_t one = r; one < std::min(r + per_unit, count); ++one) {
          if (!plain(p)) bend_row(s, head, j + one, scores + one * Bq, i, lanes);
          hide(s, head, j + one, scores + one * Bq, i, i_end, lanes);
        }
        if (plain(p)) soften<true>(r, count, i, lanes);
        else soften<false>(r, count, i, lanes);
      }
      const int64_t k_here = lanes / per_unit, into = j - item.begin;
      product<per_unit>(count, value_width, k_here, weights, Bq / per_unit, 1, g_along + i / per_unit * panel, panel_size,
                        grad_v + into * value_width, value_width, true);
      product<per_unit>(count, width, k_here, dscores, Bq / per_unit, 1, q_along + i / per_unit * panel, panel_size,
                        grad_k + into * width, width, true);
      product<per_unit>(i_end - i, width, round_up(count, per_unit) / per_unit, per_unit == 2 ? dscores_along : dscores, 1,
                        Bq, k_along, k_panel, grad_q + i * width, width, true);
    }
  }

  // Capped and biased scores.
  void bend_row(const AttentionSequence& s, int64_t head, int64_t j, float* x, int64_t i, int64_t lanes) {
    const float slope = p.slopes ? p.slopes[head] : 0.f;
    const Vec lane = ramp();
    for (int64_t c = 0; c < lanes; c += Vec::W) {
      const Vec position = lane + Vec(float(i + c + s.keys - s.queries));
      bend(Vec::load(x + c), p, slope, Vec(float(j)) - position).store(x + c);
    }
  }
  float bent_slope = 0.f, bent_from = 0.f;  // of the head; position of the block's first query after its first key

  void hide(const AttentionSequence& s, int64_t head, int64_t j, float* x, int64_t i, int64_t i_end, int64_t lanes) {
    const int64_t shift = s.keys - s.queries;
    if (p.causal) fill(x, 0, std::clamp(j - shift - i, int64_t(0), lanes), -infinity);
    if (p.window && j >= p.sinks) fill(x, std::clamp(j + p.window - shift - i, int64_t(0), lanes), lanes, -infinity);
    if (p.mask) hide_by_mask(x, mask_row(p, s, head, i) + j * p.mask_step[3], p.mask_step[2], i_end - i);
  }

  // Weights and gradients of the scores of one unit of keys.
  template <bool Plain>
  void soften(int64_t r, int64_t count, int64_t i, int64_t lanes) {
    const Vec unit(Plain ? p.scale : 1.f), factor(Plain ? p.scale * log2_e : log2_e);
    for (int64_t c = 0; c < lanes; c += Vec::W) {
      const Vec all = Vec(0.f) - Vec::load(lse + i + c), lost = Vec(0.f) - Vec::load(rest + i + c), taken = Vec::load(delta + i + c);
      Vec gradient[per_unit];
      for (int one = 0; one < per_unit; ++one) {
        gradient[one] = Vec(0.f);
        if (r + one >= count) break;
        const int64_t at = (r + one) * Bq + c;
        const Vec x = Vec::load(scores + at);
        const Vec weight = exp2(precise ? fma(fma(x, unit, all), Vec(log2_e), lost) : fma(x, factor, all));
        gradient[one] = weight * (Vec::load(slopes_of + at) - taken);
        if constexpr (!Plain) gradient[one] = gradient[one] * cap_slope(x, r + one, c);
        weight.store((U*)weights + at);
        gradient[one].store((U*)dscores + at);
      }
#if defined(__AVX512BF16__)
      if constexpr (per_unit == 2) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(gradient[0].v));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(gradient[1].v)), 16);
        _mm512_storeu_si512(dscores_along + r / 2 * Bq + c, _mm512_or_si512(low, high));
      }
#endif
    }
  }

  // 1 - tanh^2 of a capped score, found again from the score itself.
  Vec cap_slope(Vec x, int64_t r, int64_t c) const {
    if (p.softcap == 0.f) return Vec(1.f);
    const Vec distance = Vec(0.f) - (ramp() + Vec(bent_from + float(c - r)));
    const Vec ratio = (x - Vec(bent_slope) * distance) * Vec(1.f / p.softcap);
    return max(Vec(0.f), Vec(1.f) - ratio * ratio);
  }
};

int64_t attention_forward_size(const Attention& p, int64_t longest) {
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = Forward<decltype(t)>(p, longest, nullptr).size; });
  return size;
}

void attention_forward(const Attention& p, const AttentionSequence* sequences, const AttentionItem* items, int64_t count,
                       std::atomic<int64_t>& next, int64_t longest, float* memory) {
  dispatch(p.dtype, [&](auto t) {
    Forward<decltype(t)> forward(p, longest, memory);
    for (int64_t n; (n = next.fetch_add(1)) < count;) forward.run(sequences[items[n].sequence], items[n]);
  });
}

int64_t attention_few_size(const Attention& p, int64_t rows) {
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = Few<decltype(t)>(p, rows, nullptr).size; });
  return size;
}

void attention_few(const Attention& p, const AttentionSequence* sequences, const AttentionItem* items, int64_t count,
                   std::atomic<int64_t>& next, int64_t rows, float* memory, float* joined, int64_t apart) {
  dispatch(p.dtype, [&](auto t) {
    Few<decltype(t)> few(p, rows, memory);
    for (int64_t n; (n = next.fetch_add(1)) < count;) few.run(sequences[items[n].sequence], items[n], joined + n * apart);
  });
}

void attention_join(const Attention& p, const AttentionSequence& s, int64_t kv_head, float* joined, int64_t parts,
                    int64_t apart) {
  dispatch(p.dtype, [&](auto t) { Few<decltype(t)>(p, 0, nullptr).join(s, kv_head, joined, parts, apart); });
}

int64_t attention_backward_size(const Attention& p, int64_t longest_queries, int64_t keys_held) {
  int64_t size = 0;
  dispatch(p.dtype, [&](auto t) { size = Backward<decltype(t)>(p, longest_queries, keys_held, nullptr).size; });
  return size;
}

void attention_backward(const Attention& p, const AttentionSequence* sequences, const AttentionItem* items, int64_t count,
                        std::atomic<int64_t>& next, int64_t longest_queries, int64_t keys_held, float* memory,
                        float* const* partials, int64_t partial_batch, int64_t partial_head) {
  dispatch(p.dtype, [&](auto t) {
    Backward<decltype(t)> backward(p, longest_queries, keys_held, memory);
    for (int64_t n; (n = next.fetch_add(1)) < count;) {
      const AttentionSequence& s = sequences[items[n].sequence];
      backward.run(s, items[n], partials[n] ? partials[n] + s.batch * partial_batch : nullptr, partial_head);
    }
  });
}

// One query's gradient: the sum of its parts, `apart` floats from each other, in order, times the scale.
void attention_sum(const Attention& p, const float* part, int64_t parts, int64_t apart, int64_t batch, int64_t head,
                   int64_t token) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    T* to = token_of<T>(p.grad_q, p.grad_q_step, batch, head, token);
    for_each_vector(p.channels, [&](int64_t c, int lanes) {
      Vec sum(0.f);
      for (int64_t n = 0; n < parts; ++n) sum += Vec::load(part + n * apart + c);  // parts are padded to whole vectors
      store(to + c, sum * Vec(p.scale), lanes);
    });
  });
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include <cstdlib>
#include <memory>

#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(int64_t, attention_forward_size, (const Attention&, int64_t))
FASTLLM_KERNEL(void, attention_forward, (const Attention&, const AttentionSequence*, const AttentionItem*, int64_t,
                                         std::atomic<int64_t>&, int64_t, float*))
FASTLLM_KERNEL(int64_t, attention_few_size, (const Attention&, int64_t))
FASTLLM_KERNEL(void, attention_few, (const Attention&, const AttentionSequence*, const AttentionItem*, int64_t,
                                     std::atomic<int64_t>&, int64_t, float*, float*, int64_t))
FASTLLM_KERNEL(void, attention_join, (const Attention&, const AttentionSequence&, int64_t, float*, int64_t, int64_t))
FASTLLM_KERNEL(int64_t, attention_backward_size, (const Attention&, int64_t, int64_t))
FASTLLM_KERNEL(void, attention_backward, (const Attention&, const AttentionSequence*, const AttentionItem*, int64_t,
                                          std::atomic<int64_t>&, int64_t, int64_t, float*, float* const*, int64_t, int64_t))
FASTLLM_KERNEL(void, attention_sum, (const Attention&, const float*, int64_t, int64_t, int64_t, int64_t, int64_t))

using Maybe = std::optional<Tensor>;

static Tensor with_whole_rows(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }
static Strides strides_of(const Tensor& t) {
  if (t.dim() == 3) return {0, t.stride(1), t.stride(0)};
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// The problem, what its pointers point into, and its sequences.
struct AttentionOf {
  Attention p{};
  Tensor q, k, v;
  Maybe sink_logits, slopes, mask;
  std::vector<AttentionSequence> sequences;
  int64_t longest_queries = 0, longest_keys = 0;

  AttentionOf(Tensor q_, Tensor k_, Tensor v_, Maybe sinks_of, Maybe slopes_of, Maybe mask_of, Maybe bounds_q, Maybe bounds_k,
              double scale, bool causal, int64_t window, int64_t sinks, double softcap)
      : q(with_whole_rows(q_)), k(with_whole_rows(k_)), v(with_whole_rows(v_)), mask(mask_of) {
    if (sinks_of) sink_logits = to_float(*sinks_of);
    if (slopes_of) slopes = to_float(*slopes_of);
    const bool packed = q.dim() == 3;
    STD_TORCH_CHECK(q.size(q.dim() - 1) % 8 == 0 && v.size(v.dim() - 1) % 8 == 0,
                    "fastllm: attention needs head dimensions that are multiples of 8");
    p.dtype = dtype_of(q);
    p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
    p.q_step = strides_of(q), p.k_step = strides_of(k), p.v_step = strides_of(v);
    p.heads = q.size(1), p.kv_heads = k.size(1), p.channels = q.size(q.dim() - 1), p.value_channels = v.size(v.dim() - 1);
    p.scale = float(scale), p.softcap = float(softcap), p.causal = causal, p.sinks = sinks;
    if (sink_logits) p.sink_logits = (const float*)sink_logits->const_data_ptr();
    if (slopes) p.slopes = (const float*)slopes->const_data_ptr();
    if (mask) {
      p.mask = (const uint8_t*)mask->const_data_ptr();
      for (int d = 0; d < 4; ++d) p.mask_step[d] = mask->stride(d);
    }
    if (packed) {
      const Tensor of_q = torch::stable::contiguous(*bounds_q), of_k = torch::stable::contiguous(*bounds_k);
      const int32_t *a = (const int32_t*)of_q.const_data_ptr(), *b = (const int32_t*)of_k.const_data_ptr();
      const int64_t documents = of_q.size(0) - 1;
      for (int64_t d = 0; d < documents; ++d) {
        STD_TORCH_CHECK(a[d] >= 0 && b[d] >= 0 && a[d] <= a[d + 1] && b[d] <= b[d + 1],
                        "fastllm: cu_seqlens_q and cu_seqlens_k must ascend from 0");
        sequences.push_back({0, a[d], b[d], a[d + 1] - a[d], b[d + 1] - b[d]});
      }
      STD_TORCH_CHECK(a[0] == 0 && b[0] == 0 && a[documents] == q.size(0) && b[documents] == k.size(0),
                      "fastllm: cu_seqlens_q and cu_seqlens_k must end at the number of tokens");
      p.lse_batch = 0, p.lse_head = q.size(0);
    } else {
      for (int64_t b = 0; b < q.size(0); ++b) sequences.push_back({b, 0, 0, q.size(2), k.size(2)});
      p.lse_batch = p.heads * q.size(2), p.lse_head = q.size(2);
    }
    for (const auto& s : sequences) {
      longest_queries = std::max(longest_queries, s.queries), longest_keys = std::max(longest_keys, s.keys);
    }
    p.window = window < longest_keys ? window : 0;  // one that hides nothing is none
  }
};

struct Scratch {
  float* memory;
  explicit Scratch(int64_t floats)
      : memory((float*)std::aligned_alloc(64, size_t((std::max<int64_t>(floats, 16) * 4 + 63) / 64 * 64))) {
    STD_TORCH_CHECK(memory != nullptr, "fastllm: out of memory: attention needs ", floats * 4, " bytes to work in");
    advise_huge_pages(memory, size_t(floats) * 4);
  }
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
};

static int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Queries in blocks over all keys.
static void attend_blocks(const AttentionOf& of) {
  const Attention& p = of.p;
  // Few items of many queries pack keys seldom; enough of them keep all threads busy to the end.
  const int64_t whole = int64_t(of.sequences.size()) * p.kv_heads;
  const int64_t pieces = whole >= 8 * threads() ? 1 : (8 * threads() + whole - 1) / whole;
  std::vector<AttentionItem> items;
  for (int64_t n = 0; n < int64_t(of.sequences.size()); ++n) {
    const int64_t queries = of.sequences[n].queries;
    const int64_t step = std::max(query_block, ((queries + pieces - 1) / pieces + query_block - 1) / query_block * query_block);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t end = queries; end > 0;) {  // the last queries, which see most, first
        const int64_t begin = (end - 1) / step * step;
        items.push_back({n, head, begin, end});
        end = begin;
      }
    }
  }
  std::atomic<int64_t> next{0};
  const int64_t parts = std::min<int64_t>(threads(), int64_t(items.size()));
  const int64_t size = FASTLLM_PICK(attention_forward_size)(p, of.longest_keys);
  const auto kernel = FASTLLM_PICK(attention_forward);
  parallel_parts(parts, parts, [&](int64_t, int64_t, int64_t) {
    Scratch scratch(size);
    kernel(p, of.sequences.data(), items.data(), int64_t(items.size()), next, of.longest_keys, scratch.memory);
  });
}

// Keys in shares, for a few queries.
static void attend_few(const AttentionOf& of) {
  const Attention& p = of.p;
  const int64_t whole = int64_t(of.sequences.size()) * p.kv_heads, rows = p.heads / p.kv_heads * of.longest_queries;
  const int64_t most = (4 * threads() + whole - 1) / whole;
  const int64_t apart = rows * attention_row_size(p.value_channels);
  std::vector<AttentionItem> items;
  std::vector<int64_t> first_item;
  for (int64_t n = 0; n < int64_t(of.sequences.size()); ++n) {
    const AttentionSequence& s = of.sequences[n];
    int64_t keys = 0;
    if (s.queries) {
      const Visible first = visible(p, s, 0), last = visible(p, s, s.queries - 1);
      keys = first.sinks_end + std::max<int64_t>(0, last.hi - first.lo);
    }
    const int64_t shares = std::clamp<int64_t>(keys / 256, keys > 0, most);
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      first_item.push_back(int64_t(items.size()));
      for (int64_t share = 0; share < shares; ++share) items.push_back({n, head, keys * share / shares, keys * (share + 1) / shares});
    }
  }
  first_item.push_back(int64_t(items.size()));
  Scratch joined(int64_t(items.size()) * apart);
  std::atomic<int64_t> next{0};
  const int64_t size = FASTLLM_PICK(attention_few_size)(p, rows);
  const auto kernel = FASTLLM_PICK(attention_few);
  // A call of one small share is over before another thread has woken.
  const int64_t parts = of.longest_keys * whole * (p.channels + p.value_channels) < 65536 ? 1 : std::min<int64_t>(threads(), std::max<int64_t>(1, items.size()));
  parallel_parts(parts, parts, [&](int64_t, int64_t, int64_t) {
    Scratch scratch(size);
    kernel(p, of.sequences.data(), items.data(), int64_t(items.size()), next, rows, scratch.memory, joined.memory, apart);
  });
  const auto join = FASTLLM_PICK(attention_join);
  parallel_parts(whole, parts_for(whole, most * apart), [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      join(p, of.sequences[n / p.kv_heads], n % p.kv_heads, joined.memory + first_item[n] * apart,
           first_item[n + 1] - first_item[n], apart);
    }
  });
}

// The heads of a token side by side; no view of another tensor, for autograd would then refuse to let it be changed.
static Tensor fresh_out(const Tensor& q, int64_t heads, int64_t channels) {
  if (q.dim() == 3) return fresh(q, {q.size(0), heads, channels});
  const Tensor shape = torch::stable::transpose(torch::stable::new_empty(q, {q.size(0), q.size(2), heads, channels}), 1, 2);
  Tensor out = torch::stable::empty_like(shape);
  advise_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}
static Tensor fresh_lse(const Tensor& q, int64_t heads) {
  return q.dim() == 3 ? fresh_float(q, {heads, q.size(0)}) : fresh_float(q, {q.size(0), heads, q.size(2)});
}

static bool is_few(const AttentionOf& of) {
  return of.p.heads / of.p.kv_heads * of.longest_queries <= few_queries(of.p.dtype);
}

static void point_out(Attention& p, Tensor& out, Tensor& lse) {
  p.out = out.mutable_data_ptr(), p.out_step = strides_of(out), p.lse = (float*)lse.mutable_data_ptr();
}

static void attend(AttentionOf& of, Tensor& out, Tensor& lse) {
  point_out(of.p, out, lse);
  if (out.numel() == 0 && lse.numel() == 0) return;
  if (is_few(of)) attend_few(of);
  else attend_blocks(of);
}

static std::tuple<Tensor, Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Maybe sink_logits, Maybe slopes, Maybe mask,
                                            Maybe bounds_q, Maybe bounds_k, double scale, bool causal, int64_t window,
                                            int64_t sinks, double softcap) {
  AttentionOf of(q, k, v, sink_logits, slopes, mask, bounds_q, bounds_k, scale, causal, window, sinks, softcap);
  Tensor out = fresh_out(q, of.p.heads, of.p.value_channels), lse = fresh_lse(q, of.p.heads), rest = fresh_lse(q, of.p.heads);
  of.p.rest = (float*)rest.mutable_data_ptr();
  attend(of, out, lse);
  return {out, lse, rest};
}

static std::tuple<Tensor, Tensor> decode_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, Maybe sink_logits, Maybe slopes,
                                                   double scale, int64_t window, int64_t sinks, double softcap) {
  AttentionOf of(q, k, v, sink_logits, slopes, {}, {}, {}, scale, true, window, sinks, softcap);
  const Tensor of_rows = torch::stable::contiguous(torch::stable::to(lengths, torch::headeronly::ScalarType::Long));
  const int64_t* length = (const int64_t*)of_rows.const_data_ptr();
  of.longest_keys = 0;
  for (auto& s : of.sequences) {
    STD_TORCH_CHECK(length[s.batch] >= 0 && length[s.batch] <= s.keys, "fastllm: cache_lengths must lie between 0 and the cache's ",
                    s.keys, " tokens, got ", length[s.batch]);
    s.keys = length[s.batch];
    of.longest_keys = std::max(of.longest_keys, s.keys);
  }
  Tensor out = fresh_out(q, of.p.heads, of.p.value_channels), lse = fresh_lse(q, of.p.heads);
  attend(of, out, lse);
  return {out, lse};
}

static std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, Maybe grad_lse, Tensor q, Tensor k, Tensor v,
                                                             Tensor out, Tensor lse, Tensor rest, Maybe sink_logits, Maybe slopes, Maybe mask,
                                                             Maybe bounds_q, Maybe bounds_k, double scale, bool causal,
                                                             int64_t window, int64_t sinks, double softcap) {
  AttentionOf of(q, k, v, sink_logits, slopes, mask, bounds_q, bounds_k, scale, causal, window, sinks, softcap);
  Attention& p = of.p;
  Tensor grad_q = fresh_like(q), grad_k = fresh_like(k), grad_v = fresh_like(v);
  if (lse.numel() == 0 || k.numel() == 0) {
    torch::stable::zero_(grad_q), torch::stable::zero_(grad_k), torch::stable::zero_(grad_v);
    return {grad_q, grad_k, grad_v};
  }
  grad_out = with_whole_rows(grad_out), out = with_whole_rows(out), lse = torch::stable::contiguous(lse);
  rest = torch::stable::contiguous(rest);
  if (p.dtype == Dtype::f32 && is_few(of)) {  // their scores were added up in another order than a block's are: 1e-7 of each
    Tensor unused = fresh_out(q, p.heads, p.value_channels);
    lse = fresh_lse(q, p.heads), rest = fresh_lse(q, p.heads);
    p.rest = (float*)rest.mutable_data_ptr();
    point_out(p, unused, lse);
    attend_blocks(of);
  }
  if (grad_lse) grad_lse = to_float(*grad_lse);
  p.rest = (float*)rest.const_data_ptr();
  p.out = (void*)out.const_data_ptr(), p.out_step = strides_of(out), p.lse = (float*)lse.const_data_ptr();
  p.grad_out = grad_out.const_data_ptr(), p.grad_out_step = strides_of(grad_out);
  p.grad_lse = grad_lse ? (const float*)grad_lse->const_data_ptr() : nullptr;
  p.grad_q = grad_q.mutable_data_ptr(), p.grad_k = grad_k.mutable_data_ptr(), p.grad_v = grad_v.mutable_data_ptr();
  p.grad_q_step = strides_of(grad_q), p.grad_k_step = strides_of(grad_k), p.grad_v_step = strides_of(grad_v);

  // Keys of one head are split only where there are fewer heads than threads: each share then has its own sums of queries.
  const int64_t whole = int64_t(of.sequences.size()) * p.kv_heads;
  const int64_t shares = whole >= 2 * threads() ? 1 : (2 * threads() + whole - 1) / whole;
  const int64_t width = (p.channels + 15) / 16 * 16, tokens = q.dim() == 3 ? q.size(0) : q.size(2);
  const int64_t share_size = (q.dim() == 3 ? 1 : q.size(0)) * p.heads * tokens * width;
  Tensor sums = fresh_float(q, {shares > 1 ? shares : 0, shares > 1 ? share_size : 0});
  float* of_sums = shares > 1 ? (float*)sums.mutable_data_ptr() : nullptr;
  std::vector<AttentionItem> items;
  std::vector<float*> partials;
  int64_t keys_held = backward_key_block;
  for (int64_t n = 0; n < int64_t(of.sequences.size()); ++n) {
    const int64_t keys = of.sequences[n].keys;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t share = 0; share < shares; ++share) {
        const auto bound = [&](int64_t part) {
          return part == shares ? keys : keys * part / shares / backward_key_block * backward_key_block;
        };
        items.push_back({n, head, bound(share), bound(share + 1)});
        partials.push_back(of_sums ? of_sums + share * share_size : nullptr);
        keys_held = std::max(keys_held, items.back().end - items.back().begin);
      }
    }
  }
  std::atomic<int64_t> next{0};
  const int64_t parts = std::min<int64_t>(threads(), int64_t(items.size()));
  const int64_t size = FASTLLM_PICK(attention_backward_size)(p, of.longest_queries, keys_held);
  const auto kernel = FASTLLM_PICK(attention_backward);
  parallel_parts(parts, parts, [&](int64_t, int64_t, int64_t) {
    Scratch scratch(size);
    kernel(p, of.sequences.data(), items.data(), int64_t(items.size()), next, of.longest_queries, keys_held, scratch.memory,
           partials.data(), p.heads * tokens * width, tokens * width);
  });
  if (of_sums) {
    const int64_t rows = share_size / width;
    const auto add = FASTLLM_PICK(attention_sum);
    parallel_parts(rows, parts_for(rows, width), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        add(p, of_sums + row * width, shares, share_size, row / tokens / p.heads, row / tokens % p.heads, row % tokens);
      }
    });
  }
  return {grad_q, grad_k, grad_v};
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastllm::attention));
  m.impl("decode_attention", TORCH_BOX(&fastllm::decode_attention));
  m.impl("attention_backward", TORCH_BOX(&fastllm::attention_backward));
}
#endif  // FASTLLM_BINDING
