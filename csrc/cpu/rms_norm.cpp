// y = x / rms(x) * (weight + weight_offset), with or without a residual added to x first, and the gradients. Rows are
// contiguous; everything is computed in fp32.
#include "vec.h"

namespace fastllm {

struct RmsNormForward {
  Dtype dtype;
  const void* x;        // (rows, channels)
  const void* residual; // (rows, channels); null: none
  void* sum;            // (rows, channels), x + residual in its dtype, which is what is normalised; null without residual
  const float* weight;  // (channels,), weight_offset already added; null: no weight
  void* y;              // (rows, channels)
  float* rstd;          // (rows,)
  int64_t channels;
  float eps;
  bool stream;  // y is larger than the cache
};

struct RmsNormBackward {
  Dtype dtype;
  const void* grad_y;   // (rows, channels)
  const void* grad_sum; // (rows, channels), the gradient of x + residual itself, added to grad_x; null: none
  const void* x;        // (rows, channels), what was normalised
  const float* weight;  // as forward
  const float* rstd;    // (rows,)
  void* grad_x;         // (rows, channels)
  float* grad_weight;   // (channels,) sums of this range of rows, zeroed by the caller; null: not wanted
  int64_t channels;
  bool stream;
};

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

template <class T>
static void forward_rows(const RmsNormForward& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * C;
    T* y = (T*)p.y + row * C;
    if (p.residual) {  // the row stays in the first-level cache for the passes below
      const T* residual = (const T*)p.residual + row * C;
      T* sum = (T*)p.sum + row * C;
      for_each_vector(C, [&](int64_t j, int lanes) { store(sum + j, load(x + j, lanes) + load(residual + j, lanes), lanes); });
      x = sum;
    }
    Vec squares[4] = {0.f, 0.f, 0.f, 0.f};  // four chains: one would wait for its own additions
    int64_t i = 0;
    for (; i + 4 * Vec::W <= C; i += 4 * Vec::W) {
      for (int k = 0; k < 4; ++k) {
        const Vec v = Vec::load(x + i + k * Vec::W);
        squares[k] = fma(v, v, squares[k]);
      }
    }
    for_each_vector(C - i, [&](int64_t j, int lanes) {
      const Vec v = load(x + i + j, lanes);
      squares[0] = fma(v, v, squares[0]);
    });
    const float total = ((squares[0] + squares[1]) + (squares[2] + squares[3])).sum();
    const float rstd = 1.f / std::sqrt(total / float(C) + p.eps);
    p.rstd[row] = rstd;
    const bool stream_row = p.stream && (uintptr_t(y) % (Vec::W * sizeof(T)) == 0);
    // This pass reads the row from the cache and leaves memory idle: ask for the next row meanwhile.
    const T* next = (const T*)p.x + (row + 1 < end ? row + 1 : row) * C;
    for_each_vector(C, [&](int64_t j, int lanes) {
      __builtin_prefetch(next + j);
      Vec v = load(x + j, lanes) * Vec(rstd);
      if (p.weight) v *= load(p.weight + j, lanes);
      stream_row ? stream(y + j, v, lanes) : store(y + j, v, lanes);
    });
  }
  if (p.stream) stream_fence();
}

// With g = grad_y * weight and n = x * rstd:  grad_x = rstd * (g - n * mean(g n)),  grad_weight = sum over rows of grad_y n.
template <class T>
static void backward_rows(const RmsNormBackward& p, int64_t begin, int64_t end) {
  const int64_t C = p.channels;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.x + row * C;
    const T* grad_y = (const T*)p.grad_y + row * C;
    T* grad_x = (T*)p.grad_x + row * C;
    const Vec rstd = p.rstd[row];
    Vec dot = 0.f;
    for_each_vector(C, [&](int64_t j, int lanes) {
      const Vec g = load(grad_y + j, lanes), n = load(x + j, lanes) * rstd;
      const Vec gn = g * n;
      if (p.grad_weight) store(p.grad_weight + j, load(p.grad_weight + j, lanes) + gn, lanes);
      dot = p.weight ? fma(gn, load(p.weight + j, lanes), dot) : dot + gn;
    });
    const Vec mean = dot.sum() / float(C);
    const bool stream_row = p.stream && (uintptr_t(grad_x) % (Vec::W * sizeof(T)) == 0);
    const T* grad_sum = p.grad_sum ? (const T*)p.grad_sum + row * C : nullptr;
    const int64_t next = row + 1 < end ? C : 0;
    for_each_vector(C, [&](int64_t j, int lanes) {
      __builtin_prefetch(x + next + j);
      __builtin_prefetch(grad_y + next + j);
      Vec g = load(grad_y + j, lanes);
      if (p.weight) g *= load(p.weight + j, lanes);
      const Vec n = load(x + j, lanes) * rstd;
      Vec out = rstd * (g - n * mean);
      if (grad_sum) out += load(grad_sum + j, lanes);
      stream_row ? stream(grad_x + j, out, lanes) : store(grad_x + j, out, lanes);
    });
  }
  if (p.stream) stream_fence();
}

void rms_norm_forward(const RmsNormForward& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) { forward_rows<decltype(t)>(p, begin, end); });
}
void rms_norm_backward(const RmsNormBackward& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) { backward_rows<decltype(t)>(p, begin, end); });
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, rms_norm_forward, (const RmsNormForward&, int64_t, int64_t))
FASTLLM_KERNEL(void, rms_norm_backward, (const RmsNormBackward&, int64_t, int64_t))

// The weight as the kernels read it: fp32, the offset added. A few KB, so the conversion is free beside the rows.
static std::optional<Tensor> effective_weight(const std::optional<Tensor>& weight, double offset) {
  if (!weight) return std::nullopt;
  Tensor w = to_float(*weight);
  if (offset == 0) return w;
  Tensor shifted = fresh_float(w, w.sizes());
  const float* from = (const float*)w.const_data_ptr();
  float* to = (float*)shifted.mutable_data_ptr();
  for (int64_t i = 0; i < w.numel(); ++i) to[i] = from[i] + float(offset);
  return shifted;
}

static const float* data_or_null(const std::optional<Tensor>& t) { return t ? (const float*)t->const_data_ptr() : nullptr; }

// Normalises x, or x + residual, into y; returns rstd. `sum` is written where there is a residual.
static Tensor forward(const Tensor& x, const Tensor* residual, Tensor* sum, const std::optional<Tensor>& weight, double eps,
                      double weight_offset, Tensor& y) {
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  const auto sizes = x.sizes();
  Tensor rstd = fresh_float(x, sizes.slice(0, sizes.size() - 1));
  const auto w = effective_weight(weight, weight_offset);
  const RmsNormForward p{dtype_of(x), x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr,
                         sum ? sum->mutable_data_ptr() : nullptr, data_or_null(w), y.mutable_data_ptr(),
                         (float*)rstd.mutable_data_ptr(), channels, float(eps),
                         x.numel() * int64_t(x.element_size()) >= stream_bytes};
  const auto kernel = FASTLLM_PICK(rms_norm_forward);
  parallel_parts(rows, parts_for(rows, channels), [&](int64_t, int64_t b, int64_t e) { kernel(p, b, e); });
  return rstd;
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> weight, double eps, double weight_offset) {
  x = torch::stable::contiguous(x);
  Tensor y = fresh_like(x);
  Tensor rstd = forward(x, nullptr, nullptr, weight, eps, weight_offset, y);
  return {y, rstd};
}

void rms_norm_out(Tensor x, std::optional<Tensor> weight, double eps, double weight_offset, Tensor out) {
  forward(torch::stable::contiguous(x), nullptr, nullptr, weight, eps, weight_offset, out);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, std::optional<Tensor> weight, double eps,
                                                double weight_offset) {
  x = torch::stable::contiguous(x);
  residual = torch::stable::contiguous(residual);
  Tensor y = fresh_like(x), sum = fresh_like(x);
  Tensor rstd = forward(x, &residual, &sum, weight, eps, weight_offset, y);
  return {y, sum, rstd};
}

static std::tuple<Tensor, Tensor> backward(Tensor grad_y, const std::optional<Tensor>& grad_sum, Tensor x,
                                           const std::optional<Tensor>& weight, const Tensor& rstd, double weight_offset) {
  grad_y = torch::stable::contiguous(grad_y);
  x = torch::stable::contiguous(x);
  Tensor added = grad_sum ? torch::stable::contiguous(*grad_sum) : x;
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  Tensor grad_x = fresh_like(x);
  const auto w = effective_weight(weight, weight_offset);
  const int64_t parts = parts_for(rows, channels);
  Tensor partial = fresh_float(x, {weight ? 2 * parts : 0, channels});  // the totals of all parts, then their blocks
  torch::stable::zero_(partial);
  float* sums = (float*)partial.mutable_data_ptr();
  const RmsNormBackward p{dtype_of(x), grad_y.const_data_ptr(), grad_sum ? added.const_data_ptr() : nullptr, x.const_data_ptr(),
                          data_or_null(w), (const float*)rstd.const_data_ptr(), grad_x.mutable_data_ptr(), nullptr, channels,
                          x.numel() * int64_t(x.element_size()) >= stream_bytes};
  const auto kernel = FASTLLM_PICK(rms_norm_backward);
  parallel_parts(rows, parts, [&](int64_t part, int64_t b, int64_t e) {
    RmsNormBackward mine = p;
    if (!weight) return kernel(mine, b, e);
    mine.grad_weight = sums + (parts + part) * channels;
    for (int64_t row = b; row < e; row += rows_per_block) {
      kernel(mine, row, std::min(row + rows_per_block, e));
      add_block(sums + part * channels, mine.grad_weight, channels);
    }
  });
  if (!weight) return {grad_x, torch::stable::new_empty(x, {0})};
  for (int64_t part = 1; part < parts; ++part) {
    for (int64_t c = 0; c < channels; ++c) sums[c] += sums[part * channels + c];
  }
  return {grad_x, torch::stable::to(torch::stable::select(partial, 0, 0), weight->scalar_type())};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight, Tensor rstd, double,
                                             double weight_offset) {
  return backward(grad_y, std::nullopt, x, weight, rstd, weight_offset);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(Tensor grad_y, std::optional<Tensor> grad_sum, Tensor sum,
                                                 std::optional<Tensor> weight, Tensor rstd, double, double weight_offset) {
  return backward(grad_y, grad_sum, sum, weight, rstd, weight_offset);
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&fastllm::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&fastllm::rms_norm_backward));
  m.impl("rms_norm_out", TORCH_BOX(&fastllm::rms_norm_out));
  m.impl("add_rms_norm", TORCH_BOX(&fastllm::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&fastllm::add_rms_norm_backward));
}
#endif  // FASTLLM_BINDING
