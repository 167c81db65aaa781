// y = (x - mean) / std * weight + bias, and its gradients. Rows are contiguous; everything is computed in fp32.
#include "vec.h"

namespace fastllm {

struct LayerNormForward {
  Dtype dtype;
  const void* x;              // (rows, channels)
  const float *weight, *bias; // (channels,); null: none
  void* y;                    // (rows, channels)
  float *mean, *rstd;         // (rows,)
  int64_t channels;
  float eps;
  bool stream;
};

struct LayerNormBackward {
  Dtype dtype;
  const void *grad_y, *x;           // (rows, channels)
  const float* weight;              // (channels,); null: none
  const float *mean, *rstd;         // (rows,)
  void* grad_x;                     // (rows, channels)
  float *grad_weight, *grad_bias;   // (channels,) sums of this range of rows, zeroed by the caller; null: not wanted
  int64_t channels;
  bool stream;
};

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

template <class T>
static void forward_rows(const LayerNormForward& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * C;
    T* y = (T*)p.y + row * C;
    Vec sum = 0.f;
    for_each_vector(C, [&](int64_t j, int lanes) { sum += load(x + j, lanes); });
    const float mean = sum.sum() / float(C);
    // A second pass over the cached row: the difference of two large sums would cancel. What the mean lost to rounding
    // comes to light as the mean of the differences.
    Vec squares = 0.f, rest = 0.f;
    for_each_vector(C, [&](int64_t j, int lanes) {
      Vec d = load(x + j, lanes) - Vec(mean);
      if (lanes != Vec::W) d = keep_first(d, lanes, 0.f);
      squares = fma(d, d, squares);
      rest += d;
    });
    const float lost = rest.sum() / float(C), variance = squares.sum() / float(C) - lost * lost;
    const float rstd = 1.f / std::sqrt((variance < 0.f ? 0.f : variance) + p.eps);
    p.mean[row] = mean + lost;
    p.rstd[row] = rstd;
    const bool stream_row = p.stream && uintptr_t(y) % (Vec::W * sizeof(T)) == 0;
    for_each_vector(C, [&](int64_t j, int lanes) {
      Vec v = (load(x + j, lanes) - Vec(mean) - Vec(lost)) * Vec(rstd);
      if (p.weight) v *= load(p.weight + j, lanes);
      if (p.bias) v += load(p.bias + j, lanes);
      stream_row ? stream(y + j, v, lanes) : store(y + j, v, lanes);
    });
  }
  if (p.stream) stream_fence();
}

// With g = grad_y * weight and n = (x - mean) rstd:  grad_x = rstd (g - mean(g) - n mean(g n)),
// grad_weight = sum over rows of grad_y n,  grad_bias = sum over rows of grad_y.
template <class T>
static void backward_rows(const LayerNormBackward& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * C;
    const T* grad_y = (const T*)p.grad_y + row * C;
    T* grad_x = (T*)p.grad_x + row * C;
    const Vec mean = p.mean[row], rstd = p.rstd[row];
    Vec dot = 0.f, sum = 0.f;
    for_each_vector(C, [&](int64_t j, int lanes) {
      Vec g = load(grad_y + j, lanes);
      const Vec n = (load(x + j, lanes) - mean) * rstd;
      if (p.grad_weight) store(p.grad_weight + j, fma(g, n, load(p.grad_weight + j, lanes)), lanes);
      if (p.grad_bias) store(p.grad_bias + j, load(p.grad_bias + j, lanes) + g, lanes);
      if (p.weight) g *= load(p.weight + j, lanes);
      sum += g;  // lanes past the end hold g = 0
      dot = fma(g, n, dot);
    });
    const Vec mean_g = sum.sum() / float(C), mean_gn = dot.sum() / float(C);
    const bool stream_row = p.stream && uintptr_t(grad_x) % (Vec::W * sizeof(T)) == 0;
    for_each_vector(C, [&](int64_t j, int lanes) {
      Vec g = load(grad_y + j, lanes);
      if (p.weight) g *= load(p.weight + j, lanes);
      const Vec n = (load(x + j, lanes) - mean) * rstd;
      const Vec out = rstd * (g - mean_g - n * mean_gn);
      stream_row ? stream(grad_x + j, out, lanes) : store(grad_x + j, out, lanes);
    });
  }
  if (p.stream) stream_fence();
}

void layer_norm_forward(const LayerNormForward& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) { forward_rows<decltype(t)>(p, begin, end); });
}
void layer_norm_backward(const LayerNormBackward& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) { backward_rows<decltype(t)>(p, begin, end); });
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, layer_norm_forward, (const LayerNormForward&, int64_t, int64_t))
FASTLLM_KERNEL(void, layer_norm_backward, (const LayerNormBackward&, int64_t, int64_t))

static std::optional<Tensor> wide(const std::optional<Tensor>& t) { return t ? std::optional(to_float(*t)) : std::nullopt; }
static const float* data_of(const std::optional<Tensor>& t) { return t ? (const float*)t->const_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  x = torch::stable::contiguous(x);
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  const auto sizes = x.sizes();
  Tensor y = fresh_like(x), mean = fresh_float(x, sizes.slice(0, sizes.size() - 1)), rstd = fresh_like(mean);
  const auto w = wide(weight), b = wide(bias);
  const LayerNormForward p{dtype_of(x), x.const_data_ptr(), data_of(w), data_of(b), y.mutable_data_ptr(),
                           (float*)mean.mutable_data_ptr(), (float*)rstd.mutable_data_ptr(), channels, float(eps),
                           x.numel() * int64_t(x.element_size()) >= stream_bytes};
  const auto kernel = FASTLLM_PICK(layer_norm_forward);
  parallel_parts(rows, parts_for(rows, channels), [&](int64_t, int64_t first, int64_t last) { kernel(p, first, last); });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias, Tensor mean, Tensor rstd, double) {
  grad_y = torch::stable::contiguous(grad_y);
  x = torch::stable::contiguous(x);
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  Tensor grad_x = fresh_like(x);
  const auto w = wide(weight);
  const int64_t parts = parts_for(rows, channels);
  // One buffer each (two gradients that shared a storage would be outputs that alias): the parts' totals, then their blocks.
  Tensor weight_sums = fresh_float(x, {weight ? 2 * parts : 0, channels});
  Tensor bias_sums = fresh_float(x, {bias ? 2 * parts : 0, channels});
  torch::stable::zero_(weight_sums);
  torch::stable::zero_(bias_sums);
  float *of_weight = (float*)weight_sums.mutable_data_ptr(), *of_bias = (float*)bias_sums.mutable_data_ptr();
  const LayerNormBackward p{dtype_of(x), grad_y.const_data_ptr(), x.const_data_ptr(), data_of(w), (const float*)mean.const_data_ptr(),
                            (const float*)rstd.const_data_ptr(), grad_x.mutable_data_ptr(), nullptr, nullptr, channels,
                            x.numel() * int64_t(x.element_size()) >= stream_bytes};
  const auto kernel = FASTLLM_PICK(layer_norm_backward);
  parallel_parts(rows, parts, [&](int64_t part, int64_t first, int64_t last) {
    LayerNormBackward mine = p;
    if (weight) mine.grad_weight = of_weight + (parts + part) * channels;
    if (bias) mine.grad_bias = of_bias + (parts + part) * channels;
    for (int64_t row = first; row < last; row += rows_per_block) {
      kernel(mine, row, std::min(row + rows_per_block, last));
      if (weight) add_block(of_weight + part * channels, mine.grad_weight, channels);
      if (bias) add_block(of_bias + part * channels, mine.grad_bias, channels);
    }
  });
  const auto total = [&](const Tensor& sums, float* of_parts, const std::optional<Tensor>& like) {
    if (!like) return torch::stable::new_empty(x, {0});
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t c = 0; c < channels; ++c) of_parts[c] += of_parts[part * channels + c];
    }
    return torch::stable::to(torch::stable::select(sums, 0, 0), like->scalar_type());
  };
  return {grad_x, total(weight_sums, of_weight, weight), total(bias_sums, of_bias, bias)};
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&fastllm::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&fastllm::layer_norm_backward));
}
#endif  // FASTLLM_BINDING
