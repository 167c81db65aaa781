// The gradients of the policy-gradient loss: those that ppo_loss.cpp left behind, times what the loss is divided by and the
// gradient of the loss, into new tensors or, where nobody will ask for them again, in place. What is masked is not read.
#include "ppo_loss.h"

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// grad times `scale` for tokens begin.. end; a 0 stays one, whatever the scale is. Without grad: `scale` where valid. In place,
// out == grad, masked tokens are 0 already.
void ppo_scale(const float* grad, const uint8_t* mask, float scale, Dtype dtype, void* out, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    T* to = (T*)out;
    PpoStretch stretch{mask, begin, end};
    int64_t done = begin;
    const bool in_place = out == grad;
    while (stretch.next(512)) {
      const int64_t at = stretch.at;
      if (!in_place) std::fill(to + done, to + at, T{});
      done = at + stretch.n;
      if (!grad) {
        const T valid = from_float<T>(scale);
        for (int64_t j = at; j < done; ++j) to[j] = mask[j] ? valid : T{};
        continue;
      }
      for_each_vector(stretch.n, [&](int64_t j, int lanes) {
        const Vec g = load(grad + at + j, lanes), scaled = g * Vec(scale);
        store(to + at + j, where_less(Vec(0.f), g, scaled, where_less(g, Vec(0.f), scaled, g)), lanes);
      });
    }
    if (!in_place) std::fill(to + done, to + end, T{});
  });
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, ppo_scale, (const float*, const uint8_t*, float, Dtype, void*, int64_t, int64_t))

using Maybe = std::optional<Tensor>;

struct PpoGradient {
  const float* from;  // null: `by` for every valid token
  float by;
  Dtype dtype;
  void* to;
};

static void scale_all(const std::vector<PpoGradient>& wanted, const Tensor& mask) {
  const auto* valid = (const uint8_t*)mask.const_data_ptr();
  const int64_t tokens = mask.numel();
  const auto kernel = FASTLLM_PICK(ppo_scale);
  parallel_parts(tokens, parts_for(tokens, int64_t(wanted.size())), [&](int64_t, int64_t b, int64_t e) {
    for (const PpoGradient& g : wanted) kernel(g.from, valid, g.by, g.dtype, g.to, b, e);
  });
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss_backward(
    Tensor grad_loss, Tensor grads, Tensor scale, Tensor logprobs, Tensor, Tensor, Tensor mask, Maybe values, Maybe, Maybe,
    Maybe entropy, Maybe, Maybe, Maybe, Maybe, double, double, double, double, double, double, double entropy_coef, double,
    int64_t, int64_t, int64_t aggregation, int64_t) {
  mask = dense(mask);
  const int64_t tokens = mask.numel();
  const float factor = *(const float*)grad_loss.const_data_ptr() * *(const float*)scale.const_data_ptr();
  const float* from = (const float*)grads.const_data_ptr();
  std::vector<PpoGradient> wanted;
  const auto scaled = [&](const Maybe& like, const float* from, float by) {
    if (!like) return torch::stable::new_empty(grad_loss, {0});
    Tensor out = fresh_like(*like);
    wanted.push_back({from, by, dtype_of(out), out.mutable_data_ptr()});
    return out;
  };
  Tensor of_logprobs = scaled(logprobs, from, factor);
  Tensor of_values = scaled(values, from + tokens, factor);
  const bool stored = ppo_stores_entropy(aggregation);
  Tensor of_entropy = scaled(entropy, stored ? from + (values ? 2 : 1) * tokens : nullptr,
                             stored ? factor : entropy_coef == 0 ? 0.f : float(-entropy_coef) * factor);
  scale_all(wanted, mask);
  return {of_logprobs, of_values, of_entropy};
}

Tensor ppo_loss_backward_(Tensor grads, Tensor mask, Tensor grad_loss, Tensor scale, bool entropy, double entropy_coef) {
  mask = dense(mask);
  const int64_t tokens = mask.numel();
  const float factor = *(const float*)grad_loss.const_data_ptr() * *(const float*)scale.const_data_ptr();
  float* stored = (float*)grads.mutable_data_ptr();
  std::vector<PpoGradient> wanted;
  for (int64_t i = 0; i < grads.size(0); ++i) {
    wanted.push_back({stored + i * tokens, factor, Dtype::f32, stored + i * tokens});
  }
  Tensor of_entropy = entropy ? fresh_float(grads, mask.sizes()) : torch::stable::new_empty(grad_loss, {0});
  if (entropy) {
    const float by = entropy_coef == 0 ? 0.f : float(-entropy_coef) * factor;
    wanted.push_back({nullptr, by, Dtype::f32, of_entropy.mutable_data_ptr()});
  }
  scale_all(wanted, mask);
  return of_entropy;
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("ppo_loss_backward", TORCH_BOX(&fastllm::ppo_loss_backward));
  m.impl("ppo_loss_backward_", TORCH_BOX(&fastllm::ppo_loss_backward_));
}
#endif  // FASTLLM_BINDING
