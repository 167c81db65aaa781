// What the bindings of attention's passes share: the problem made of tensors, room to work in, outputs.
#pragma once

#include <cstdlib>

#include "attention.h"
#include "binding.h"

namespace fastllm {

using Maybe = std::optional<Tensor>;

inline Tensor with_whole_rows(const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }
inline Strides strides_of(const Tensor& t) {
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

inline int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// The heads of a token side by side; no view of another tensor, for autograd would then refuse to let it be changed.
inline Tensor fresh_out(const Tensor& q, int64_t heads, int64_t channels) {
  if (q.dim() == 3) return fresh(q, {q.size(0), heads, channels});
  const Tensor shape = torch::stable::transpose(torch::stable::new_empty(q, {q.size(0), q.size(2), heads, channels}), 1, 2);
  Tensor out = torch::stable::empty_like(shape);
  advise_huge_pages(out.mutable_data_ptr(), size_t(out.numel()) * out.element_size());
  return out;
}
inline Tensor fresh_lse(const Tensor& q, int64_t heads) {
  return q.dim() == 3 ? fresh_float(q, {heads, q.size(0)}) : fresh_float(q, {q.size(0), heads, q.size(2)});
}

inline bool is_few(const AttentionOf& of) {
  return of.p.heads / of.p.kv_heads * of.longest_queries <= few_queries(of.p.dtype);
}

inline void point_out(Attention& p, Tensor& out, Tensor& lse) {
  p.out = out.mutable_data_ptr(), p.out_step = strides_of(out), p.lse = (float*)lse.mutable_data_ptr();
}

void attend_blocks(const AttentionOf& of);       // attention.cpp: queries in blocks over all keys
void attend_few(const AttentionOf& of);          // decode_attention.cpp: keys in shares, for a few queries
void attend(AttentionOf& of, Tensor& out, Tensor& lse);  // whichever suits

}  // namespace fastllm
