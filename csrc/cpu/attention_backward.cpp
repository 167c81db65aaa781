// Gradients of attention: a block of keys goes over the queries that see it, scores transposed (keys down, queries across), so
// that the statistics of the queries lie along the vectors; sums of keys stay in place and those of queries are kept in fp32
// for a whole head.
#include "attention.h"

namespace fastllm {
constexpr int64_t backward_key_block = 96, backward_query_block = 192;
}

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

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
#include "attention_binding.h"

namespace fastllm {

FASTLLM_KERNEL(int64_t, attention_backward_size, (const Attention&, int64_t, int64_t))
FASTLLM_KERNEL(void, attention_backward, (const Attention&, const AttentionSequence*, const AttentionItem*, int64_t,
                                          std::atomic<int64_t>&, int64_t, int64_t, float*, float* const*, int64_t, int64_t))
FASTLLM_KERNEL(void, attention_sum, (const Attention&, const float*, int64_t, int64_t, int64_t, int64_t, int64_t))

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
  m.impl("attention_backward", TORCH_BOX(&fastllm::attention_backward));
}
#endif  // FASTLLM_BINDING
