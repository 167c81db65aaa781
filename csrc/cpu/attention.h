// What the passes of attention share: the problem, which keys a query sees, and how a block of scores becomes weights.
//
// Forward (attention.cpp): a block of queries goes over the keys it sees with an online softmax; a few queries go over keys
// where they lie (decode_attention.cpp). Backward (attention_backward.cpp): a block of keys goes over the queries that see it.
#pragma once

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

inline void fill(float* p, int64_t begin, int64_t end, float value) {
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

inline const uint8_t* mask_row(const Attention& p, const AttentionSequence& s, int64_t head, int64_t i) {
  return p.mask + s.batch * p.mask_step[0] + head * p.mask_step[1] + i * p.mask_step[2];
}

// True when the mask hides all of the keys [j, j_end) from all of the queries [i, i_end).
inline bool masked(const Attention& p, const AttentionSequence& s, int64_t head, int64_t i, int64_t i_end, int64_t j,
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
inline void hide_by_mask(float* x, const uint8_t* seen, int64_t step, int64_t count) {
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

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA
