// The gradients of the policy-gradient loss: those that ppo_loss.cpp left behind, times what the loss is divided by and the
// gradient of the loss. What is masked is not read.
#include "ppo_loss.h"

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// grad times `scale` for tokens begin.. end; a 0 stays one, whatever the scale is. Without grad: `scale` where valid.
void ppo_scale(const float* grad, const uint8_t* mask, float scale, Dtype dtype, void* out, int64_t begin, int64_t end) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    T* to = (T*)out;
    PpoStretch stretch{mask, begin, end};
    int64_t done = begin;
    while (stretch.next(512)) {
      const int64_t at = stretch.at;
      std::fill(to + done, to + at, T{});
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
    std::fill(to + done, to + end, T{});
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

std::tuple<Tensor, Tensor, Tensor> ppo_loss_backward(
    Tensor grad_loss, Tensor grads, Tensor scale, Tensor logprobs, Tensor, Tensor, Tensor mask, Maybe values, Maybe, Maybe,
    Maybe entropy, Maybe, Maybe, Maybe, Maybe, double, double, double, double, double, double, double entropy_coef, double,
    int64_t, int64_t, int64_t aggregation, int64_t) {
  mask = dense(mask);
  const int64_t tokens = mask.numel();
  const float factor = *(const float*)grad_loss.const_data_ptr() * *(const float*)scale.const_data_ptr();
  const uint8_t* valid = (const uint8_t*)mask.const_data_ptr();
  const auto kernel = FASTLLM_PICK(ppo_scale);
  const auto scaled = [&](const Maybe& like, const float* from, float by) {
    if (!like) return torch::stable::new_empty(grad_loss, {0});
    Tensor out = fresh_like(*like);
    void* to = out.mutable_data_ptr();
    const Dtype dtype = dtype_of(out);
    parallel_parts(tokens, parts_for(tokens, 1),
                   [&](int64_t, int64_t b, int64_t e) { kernel(from, valid, by, dtype, to, b, e); });
    return out;
  };
  const float* from = (const float*)grads.const_data_ptr();
  Tensor of_logprobs = scaled(logprobs, from, factor);
  Tensor of_values = scaled(values, from + tokens, factor);
  const bool stored = ppo_stores_entropy(aggregation);
  Tensor of_entropy = scaled(entropy, stored ? from + (values ? 2 : 1) * tokens : nullptr,
                             stored ? factor : entropy_coef == 0 ? 0.f : float(-entropy_coef) * factor);
  return {of_logprobs, of_values, of_entropy};
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) { m.impl("ppo_loss_backward", TORCH_BOX(&fastllm::ppo_loss_backward)); }
#endif  // FASTLLM_BINDING
