// softmax(q k) v: a block of queries goes over the keys it sees with an online softmax; scores of one block at a time, in fp32.
#include "attention.h"

namespace fastllm {
constexpr int64_t query_block = 48, key_block = 128;
}

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

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

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "attention_binding.h"

namespace fastllm {

FASTLLM_KERNEL(int64_t, attention_forward_size, (const Attention&, int64_t))
FASTLLM_KERNEL(void, attention_forward, (const Attention&, const AttentionSequence*, const AttentionItem*, int64_t,
                                         std::atomic<int64_t>&, int64_t, float*))

// Queries in blocks over all keys.
void attend_blocks(const AttentionOf& of) {
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

void attend(AttentionOf& of, Tensor& out, Tensor& lse) {
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

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("attention", TORCH_BOX(&fastllm::attention));
}
#endif  // FASTLLM_BINDING
