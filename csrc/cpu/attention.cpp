// softmax(q k) v over blocks of queries and keys, and its gradients; scores of one block at a time, in fp32.
//
// Forward: a block of queries goes over the keys it sees with an online softmax. Backward: a block of keys goes over the
// queries that see it, scores transposed (keys down, queries across), so that the statistics of the queries lie along
// the vectors; sums of keys stay in place and those of queries are kept in fp32 for a whole head.
#include <algorithm>
#include <atomic>

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
  const bool* mask;  // null: none
  int64_t mask_step[4];
  void* out;
  Strides out_step;
  float* lse;
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
inline Visible visible(const Attention& p, const AttentionSequence& s, int64_t i) {
  const int64_t position = i + s.keys - s.queries;
  const int64_t hi = p.causal ? std::clamp<int64_t>(position + 1, 0, s.keys) : s.keys;
  const int64_t lo = p.window ? std::clamp<int64_t>(position - p.window + 1, 0, hi) : 0;
  return {std::min(p.sinks, lo), lo, hi};
}

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

constexpr float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;
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

// ---- scores to what the softmax sees ---------------------------------------------------------------------------

// In units of log 2: score = softcap and slope applied, all times log2(e).
static inline Vec bend(Vec s, const Attention& p, float slope, Vec distance) {
  s = s * Vec(p.scale);
  if (p.softcap != 0.f) s = Vec(p.softcap) * tanh(s * Vec(1.f / p.softcap));
  return fma(Vec(slope), distance, s) * Vec(log2_e);
}
static inline Vec ramp() {
  float lanes[Vec::W];
  for (int i = 0; i < Vec::W; ++i) lanes[i] = float(i);
  return Vec::load(lanes);
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
      pack(s, kv_head, j / key_block);
      const int64_t j_end = std::min(j + key_block, hi), lanes = round_up(j_end - j, Vec::W);
      product<per_unit>(count, lanes, units, q, query_step, 1, keys + j * units, panel * units, scores, key_block, false);
      for (int64_t r = 0; r < count; ++r) soften(s, head, begin + r, r, j, j_end, lanes, started);
      product<per_unit>(count, width, lanes / per_unit, weights, key_block / per_unit, 1, values + j / per_unit * panel,
                        values_panel, sum, width, started);
      started = true;
    };
    for (int64_t j = 0; j < std::min(std::min(p.sinks, hi), lo); j += key_block) block(j);
    for (int64_t j = lo; j < hi; j += key_block) block(j);
    for (int64_t r = 0; r < count; ++r) finish(s, head, begin + r, r, started);
  }

  // Scores of one query in a block to weights, its running maximum and sum, and the scale of what is summed already.
  void soften(const AttentionSequence& s, int64_t head, int64_t i, int64_t r, int64_t j, int64_t j_end, int64_t lanes,
              bool started) {
    float* x = scores + r * key_block;
    const Visible seen = visible(p, s, i);
    const float slope = p.slopes ? p.slopes[head] : 0.f;
    float factor = p.scale * log2_e;
    if (p.softcap != 0.f || slope != 0.f || !(p.scale > 0.f)) {
      factor = 1.f;
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
    if (p.mask) {
      const bool* row = p.mask + s.batch * p.mask_step[0] + head * p.mask_step[1] + i * p.mask_step[2];
      for (int64_t c = j; c < j_end; ++c) {
        if (!row[c * p.mask_step[3]]) x[c - j] = -infinity;
      }
    }
    Vec most(-infinity);
    for (int64_t c = 0; c < lanes; c += Vec::W) most = max(Vec::load(x + c), most);
    const float before = top[r], now = std::max(before, most.largest() * factor);
    const float shift = now == -infinity ? 0.f : now;
    Vec added(0.f);
    U* weight = (U*)(weights + r * (key_block / per_unit));
    for (int64_t c = 0; c < lanes; c += Vec::W) {
      const Vec e = exp2(fma(Vec::load(x + c), Vec(factor), Vec(-shift)));
      added += e;
      e.store(weight + c);
    }
    if (started && now != before) {
      const float shrink = before == -infinity ? 0.f : std::exp2(before - now);
      total[r] *= shrink;
      float* row = sum + r * width;
      for (int64_t c = 0; c < width; c += Vec::W) (Vec::load(row + c) * Vec(shrink)).store(row + c);
    }
    total[r] += added.sum();
    top[r] = now;
  }

  void finish(const AttentionSequence& s, int64_t head, int64_t i, int64_t r, bool started) {
    float most = top[r], all = total[r], share = 1.f;
    if (p.sink_logits) {
      const float sink = p.sink_logits[head] * log2_e, before = most;
      most = std::max(most, sink);
      if (most != -infinity) {
        share = before == -infinity ? 0.f : std::exp2(before - most);
        all = all * share + std::exp2(sink - most);
      }
    }
    const bool blind = most == -infinity && all == 0.f;
    if (blind || !started) share = 0.f;
    else share /= all;
    T* out = token_of<T>(p.out, p.out_step, s.batch, head, s.first_query + i);
    const float* row = sum + r * width;
    for_each_vector(p.value_channels, [&](int64_t c, int lanes) {
      store(out + c, share == 0.f ? Vec(0.f) : Vec::load(row + c) * Vec(share), lanes);
    });
    float* lse = p.lse + s.batch * p.lse_batch + head * p.lse_head + s.first_query + i;
    *lse = blind ? -infinity : most * ln_2 + std::log(all);
  }
};

// ---- backward --------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  using U = typename Operand<T>::type;
  static constexpr int per_unit = Operand<T>::per_unit;
  static constexpr int64_t Bk = backward_key_block, Bq = backward_query_block;
  const Attention& p;
  int64_t units, value_units, width, value_width, queries, keys_held;
  float *q_across, *q_along, *g_across, *g_along, *k_rows, *v_rows, *k_along, *scores, *slopes_of, *weights, *dscores,
      *dscores_along, *grad_q, *grad_k, *grad_v, *lse, *delta;
  int64_t panel_size, k_panel;
  int64_t size;

  Backward(const Attention& p, int64_t longest_queries, int64_t keys_held, float* memory) : p(p), keys_held(keys_held) {
    units = p.channels / per_unit, value_units = p.value_channels / per_unit;
    width = round_up(p.channels, Vec::W), value_width = round_up(p.value_channels, Vec::W);
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
      lse[first + i] = found == -infinity ? infinity : found * log2_e;  // a query that saw nothing has no weights
    }
    fill(lse, first + count, first + room, infinity);
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
    const bool plain = p.softcap == 0.f && !p.slopes;
    for (int64_t i = round_down(from, panel); i < to; i += Bq) {
      const int64_t i_end = std::min(i + Bq, to), lanes = round_up(i_end - i, Vec::W);
      product<per_unit>(count, lanes, units, k, k_unit_step, 1, q_across + i * units, panel * units, scores, Bq, false);
      product<per_unit>(count, lanes, value_units, v, v_unit_step, 1, g_across + i * value_units, panel * value_units,
                        slopes_of, Bq, false);
      for (int64_t r = 0; r < count; r += per_unit) {
        for (int64_t one = r; one < std::min(r + per_unit, count); ++one) {
          if (!plain) bend_row(s, head, j + one, scores + one * Bq, i, lanes);
          hide(s, head, j + one, scores + one * Bq, i, i_end, lanes);
        }
        if (plain) soften<true>(r, count, i, lanes);
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

  // Capped and biased scores times log2(e), and what the cap multiplies their gradients by, in the place of dP until then.
  void bend_row(const AttentionSequence& s, int64_t head, int64_t j, float* x, int64_t i, int64_t lanes) {
    const float slope = p.slopes ? p.slopes[head] : 0.f;
    const Vec lane = ramp();
    for (int64_t c = 0; c < lanes; c += Vec::W) {
      const Vec position = lane + Vec(float(i + c + s.keys - s.queries));
      bend(Vec::load(x + c), p, slope, Vec(float(j)) - position).store(x + c);
    }
    bent_slope = slope;
    bent_from = float(i + s.keys - s.queries - j);
  }
  float bent_slope = 0.f, bent_from = 0.f;

  void hide(const AttentionSequence& s, int64_t head, int64_t j, float* x, int64_t i, int64_t i_end, int64_t lanes) {
    const int64_t shift = s.keys - s.queries;
    if (p.causal) fill(x, 0, std::clamp(j - shift - i, int64_t(0), lanes), -infinity);
    if (p.window && j >= p.sinks) fill(x, std::clamp(j + p.window - shift - i, int64_t(0), lanes), lanes, -infinity);
    if (p.mask) {
      const bool* column = p.mask + s.batch * p.mask_step[0] + head * p.mask_step[1] + j * p.mask_step[3];
      for (int64_t c = i; c < i_end; ++c) {
        if (!column[c * p.mask_step[2]]) x[c - i] = -infinity;
      }
    }
  }

  // Weights and gradients of the scores of one unit of keys.
  template <bool Plain>
  void soften(int64_t r, int64_t count, int64_t i, int64_t lanes) {
    const float factor = Plain ? p.scale * log2_e : 1.f;
    for (int64_t c = 0; c < lanes; c += Vec::W) {
      const Vec all = Vec::load(lse + i + c), taken = Vec::load(delta + i + c);
      Vec gradient[per_unit];
      for (int one = 0; one < per_unit; ++one) {
        gradient[one] = Vec(0.f);
        if (r + one >= count) break;
        const int64_t at = (r + one) * Bq + c;
        const Vec x = Vec::load(scores + at);
        const Vec weight = exp2(Plain ? fma(x, Vec(factor), Vec(0.f) - all) : x - all);
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
    (void)r;
    if (p.softcap == 0.f) return Vec(1.f);
    const Vec distance = Vec(0.f) - (ramp() + Vec(bent_from + float(c)));
    const Vec ratio = (x * Vec(ln_2) - Vec(bent_slope) * distance) * Vec(1.f / p.softcap);
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

// The queries' gradients: the sum of their parts, in order, times the scale.
void attention_sum(const Attention& p, const float* parts, int64_t count, int64_t part_size, int64_t width, int64_t batch,
                   int64_t head, const float* row, int64_t token) {
  (void)parts;
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    T* to = token_of<T>(p.grad_q, p.grad_q_step, batch, head, token);
    for_each_vector(p.channels, [&](int64_t c, int lanes) {
      Vec sum(0.f);
      for (int64_t n = 0; n < count; ++n) sum += Vec::load(row + n * part_size + c);
      store(to + c, sum * Vec(p.scale), lanes);
    });
  });
  (void)width;
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA
