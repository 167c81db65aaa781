// Attention of a few queries, as in decoding: bound by the bytes of keys and values, which are read once, where they lie.
#include "attention.h"

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

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

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "attention_binding.h"

namespace fastllm {

FASTLLM_KERNEL(int64_t, attention_few_size, (const Attention&, int64_t))
FASTLLM_KERNEL(void, attention_few, (const Attention&, const AttentionSequence*, const AttentionItem*, int64_t,
                                     std::atomic<int64_t>&, int64_t, float*, float*, int64_t))
FASTLLM_KERNEL(void, attention_join, (const Attention&, const AttentionSequence&, int64_t, float*, int64_t, int64_t))

// Keys in shares, for a few queries.
void attend_few(const AttentionOf& of) {
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

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&fastllm::decode_attention));
}
#endif  // FASTLLM_BINDING
