// The gradients of the policy-gradient loss: those that ppo_loss.cpp left behind times the gradient of the loss, into new tensors
// or, where nobody will ask for them again, in place. What is masked is not read.
#include "ppo_loss.h"

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// grad times `scale` for tokens begin.. end; a 0 stays one, whatever the scale is. In place, out == grad, masked tokens are 0
// already.
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
  const float* from;
  Dtype dtype;
  void* to;
};

static float factor_of(const Tensor& grad_loss, const Tensor& scale) {
  return *(const float*)grad_loss.const_data_ptr() * *(const float*)scale.const_data_ptr();
}

static void scale_all(const std::vector<PpoGradient>& wanted, const Tensor& mask, float by) {
  const auto* valid = (const uint8_t*)mask.const_data_ptr();
  const int64_t tokens = mask.numel();
  const auto kernel = FASTLLM_PICK(ppo_scale);
  parallel_parts(tokens, parts_for(tokens, int64_t(wanted.size())), [&](int64_t, int64_t b, int64_t e) {
    for (const PpoGradient& g : wanted) kernel(g.from, valid, by, g.dtype, g.to, b, e);
  });
}

std::tuple<Tensor, Tensor, Tensor> ppo_loss_backward(
    Tensor grad_loss, Tensor scale, Tensor stored_logprobs, Tensor stored_values, Tensor stored_entropy, Tensor logprobs,
    Tensor, Tensor, Tensor mask, Maybe values, Maybe, Maybe, Maybe entropy, Maybe, Maybe, Maybe, Maybe, double, double,
    double, double, double, double, double, double, int64_t, int64_t, int64_t, int64_t) {
  mask = dense(mask);
  std::vector<PpoGradient> wanted;
  const auto scaled = [&](const Tensor& stored, const Maybe& like) {
    if (!like) return torch::stable::new_empty(grad_loss, {0});
    Tensor out = fresh_like(*like);
    wanted.push_back({(const float*)stored.const_data_ptr(), dtype_of(out), out.mutable_data_ptr()});
    return out;
  };
  Tensor of_logprobs = scaled(stored_logprobs, logprobs), of_values = scaled(stored_values, values);
  Tensor of_entropy = scaled(stored_entropy, entropy);
  scale_all(wanted, mask, factor_of(grad_loss, scale));
  return {of_logprobs, of_values, of_entropy};
}

void ppo_loss_backward_(
    Tensor grad_loss, Tensor scale, Tensor mask, Tensor grad_logprobs, Tensor grad_values, Tensor grad_entropy) {
  std::vector<PpoGradient> wanted;
  for (Tensor* grad : {&grad_logprobs, &grad_values, &grad_entropy}) {
    float* data = (float*)grad->mutable_data_ptr();
    if (grad->numel()) wanted.push_back({data, Dtype::f32, data});
  }
  scale_all(wanted, dense(mask), factor_of(grad_loss, scale));
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("ppo_loss_backward", TORCH_BOX(&fastllm::ppo_loss_backward));
  m.impl("ppo_loss_backward_", TORCH_BOX(&fastllm::ppo_loss_backward_));
}
#endif  // FASTLLM_BINDING
