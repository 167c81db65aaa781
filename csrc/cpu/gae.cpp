// Generalised advantage estimation, from the last token of each sequence to its first.
//
// With S = V + lam A of the next valid token, a token's advantage is A = (r - V) + gamma (1 - done) S, and its own
// S = [V + lam (r - V)] + [lam gamma (1 - done)] S': a chain of one multiplication and addition a token, which a masked
// token passes on as 0 + 1 S'. All else is done for whole vectors of tokens. The chains of several sequences run side by
// side, since one alone would wait for its own results. Everything is computed in fp32.
#include "vec.h"

namespace fastllm {

struct Gae {
  Dtype rewards_dtype, values_dtype;
  const void *rewards, *values;       // tokens, contiguous
  const uint8_t *mask, *dones;        // tokens; null: all valid, none done
  float *advantages, *returns;        // tokens
  float gamma, lam;
  bool stream;  // the outputs are larger than the cache
};
struct GaeSequence { int64_t begin, end; };
constexpr int gae_lanes = 8;  // sequences side by side

}  // namespace fastllm

#ifdef FASTLLM_ISA
#include <algorithm>

namespace fastllm {
namespace FASTLLM_ISA {

static constexpr int64_t BLOCK = 128;  // tokens of each sequence at a time: what is kept of them fits the L1 cache

// Where n values from `at` on stand as fp32: in place, or converted into `room`.
static const float* widened(Dtype dtype, const void* data, int64_t at, int64_t n, float* room) {
  if (dtype == Dtype::f32) return (const float*)data + at;
  dispatch(dtype, [&](auto t) {
    const auto* from = (const decltype(t)*)data + at;
    for_each_vector(n, [&](int64_t j, int lanes) { store(room + j, load(from + j, lanes), lanes); });
  });
  return room;
}

struct Lane {
  alignas(64) float slope[BLOCK], next[BLOCK];  // S = offset + slope S'; `next` holds the offset, then S'
  alignas(64) float rewards[BLOCK], values[BLOCK], valid[BLOCK], discount[BLOCK];
  const float *r, *v;
  int64_t at, n;  // the tokens of this block, which stand at the end of the arrays above
};

// CUTS: some slopes are 0, and there not even a NaN is taken from what follows.
template <bool CUTS>
static void chain(Lane* lane, int64_t longest, float* state) {
  float s[gae_lanes];
  for (int k = 0; k < gae_lanes; ++k) s[k] = state[k];
  for (int64_t t = BLOCK - 1; t >= BLOCK - longest; --t) {
    for (int k = 0; k < gae_lanes; ++k) {
      const float offset = lane[k].next[t];
      lane[k].next[t] = s[k];
      const float slope = lane[k].slope[t], taken = slope * s[k];
      s[k] = offset + (CUTS && slope == 0.f ? 0.f : taken);
    }
  }
  for (int k = 0; k < gae_lanes; ++k) state[k] = s[k];
}

// Up to gae_lanes sequences.
void gae_sequences(const Gae& p, const GaeSequence* sequences, int64_t count) {
  static thread_local Lane lane[gae_lanes];
  float state[gae_lanes] = {};
  int64_t most = 0;
  const bool cuts = p.dones || p.lam * p.gamma == 0.f;
  for (int64_t k = 0; k < count; ++k) most = std::max(most, sequences[k].end - sequences[k].begin);
  for (int64_t done = 0; done < most; done += BLOCK) {
    const int64_t longest = std::min(BLOCK, most - done);
    for (int64_t k = 0; k < gae_lanes; ++k) {
      Lane& l = lane[k];
      const int64_t end = k < count ? sequences[k].end - done : 0;
      l.n = k < count ? std::max<int64_t>(0, std::min(BLOCK, end - sequences[k].begin)) : 0;
      l.at = end - l.n;
      const int64_t first = BLOCK - l.n;
      std::fill(l.slope + (BLOCK - longest), l.slope + first, 1.f);
      std::fill(l.next + (BLOCK - longest), l.next + first, 0.f);
      if (!l.n) continue;
      l.r = widened(p.rewards_dtype, p.rewards, l.at, l.n, l.rewards);
      l.v = widened(p.values_dtype, p.values, l.at, l.n, l.values);
      if (p.mask) for (int64_t j = 0; j < l.n; ++j) l.valid[j] = p.mask[l.at + j] ? 1.f : 0.f;
      if (p.dones) for (int64_t j = 0; j < l.n; ++j) l.discount[j] = p.dones[l.at + j] ? 0.f : p.gamma;
      for_each_vector(l.n, [&](int64_t j, int lanes) {
        __builtin_prefetch(l.r + j - BLOCK);  // what comes next, to the left, where the processor does not look by itself
        __builtin_prefetch(l.v + j - BLOCK);
        const Vec v = load(l.v + j, lanes);
        Vec offset = p.lam == 0.f ? v : fma(Vec(p.lam), load(l.r + j, lanes) - v, v);
        Vec slope = p.dones ? Vec(p.lam) * load(l.discount + j, lanes) : Vec(p.lam * p.gamma);
        if (p.mask) {
          const Vec valid = load(l.valid + j, lanes);
          offset = where_less(Vec(0.f), valid, offset, Vec(0.f));
          slope = where_less(Vec(0.f), valid, slope, Vec(1.f));
        }
        store(l.next + first + j, offset, lanes);
        store(l.slope + first + j, slope, lanes);
      });
    }
    cuts ? chain<true>(lane, longest, state) : chain<false>(lane, longest, state);
    for (int64_t k = 0; k < count; ++k) {
      const Lane& l = lane[k];
      const float* next = l.next + (BLOCK - l.n);
      float *advantages = p.advantages + l.at, *returns = p.returns + l.at;
      const bool aligned = (uintptr_t(advantages) | uintptr_t(returns)) % (Vec::W * sizeof(float)) == 0;
      for_each_vector(l.n, [&](int64_t j, int lanes) {
        const Vec v = load(l.v + j, lanes), discount = p.dones ? load(l.discount + j, lanes) : Vec(p.gamma);
        Vec following = load(next + j, lanes);
        if (cuts) following = where_less(Vec(0.f), discount, following, Vec(0.f));
        Vec a = fma(discount, following, load(l.r + j, lanes) - v), r = a + v;
        if (p.mask) {
          const Vec valid = load(l.valid + j, lanes);
          a = where_less(Vec(0.f), valid, a, Vec(0.f));
          r = where_less(Vec(0.f), valid, r, Vec(0.f));
        }
        if (p.stream && aligned) {
          stream(advantages + j, a, lanes);
          stream(returns + j, r, lanes);
        } else {
          store(advantages + j, a, lanes);
          store(returns + j, r, lanes);
        }
      });
    }
  }
  if (p.stream) stream_fence();
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, gae_sequences, (const Gae&, const GaeSequence*, int64_t))

std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, std::optional<Tensor> mask, std::optional<Tensor> dones,
                               std::optional<Tensor> cu_seqlens, double gamma, double lam) {
  rewards = dense(rewards);
  values = dense(values);
  if (mask) mask = dense(*mask);
  if (dones) dones = dense(*dones);
  const int64_t tokens = rewards.numel();
  std::vector<GaeSequence> sequences;
  if (cu_seqlens) {
    for_each_sequence(*cu_seqlens, tokens, [&](int64_t begin, int64_t end) { sequences.push_back({begin, end}); });
  } else {
    const int64_t length = std::max<int64_t>(1, rewards.size(rewards.dim() - 1));
    for (int64_t at = 0; at < tokens; at += length) sequences.push_back({at, at + length});
  }
  Tensor advantages = fresh_float(rewards, rewards.sizes()), returns = fresh_float(rewards, rewards.sizes());
  const Gae p{dtype_of(rewards), dtype_of(values), rewards.const_data_ptr(), values.const_data_ptr(),
              mask ? (const uint8_t*)mask->const_data_ptr() : nullptr, dones ? (const uint8_t*)dones->const_data_ptr() : nullptr,
              (float*)advantages.mutable_data_ptr(), (float*)returns.mutable_data_ptr(), float(gamma), float(lam),
              tokens * int64_t(sizeof(float)) >= stream_bytes};
  const auto kernel = FASTLLM_PICK(gae_sequences);
  const int64_t count = int64_t(sequences.size()), groups = (count + gae_lanes - 1) / gae_lanes;
  parallel_parts(groups, parts_for(groups, tokens / std::max<int64_t>(1, groups)), [&](int64_t, int64_t b, int64_t e) {
    for (int64_t g = b; g < e; ++g) {
      kernel(p, sequences.data() + g * gae_lanes, std::min<int64_t>(gae_lanes, count - g * gae_lanes));
    }
  });
  return {advantages, returns};
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("gae", TORCH_BOX(&fastllm::gae)); }
#endif  // FASTLLM_BINDING
