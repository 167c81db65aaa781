// y = act(gate) * up and its gradients, act one of silu and the two forms of gelu, in one pass each. Computed in fp32.
#include <algorithm>

#include "vec.h"

namespace fastllm {

constexpr int64_t glu_piece = 512;  // elements between two rounds of prefetching; rows that ask for it hold two or more

enum class GluActivation : int64_t { silu, gelu_tanh, gelu_erf };

// gate, up and grad are rows of contiguous channels with a stride of their own between rows (in elements): they may be
// the two halves of one projection. The outputs are contiguous. A range [begin, end) counts output elements.
struct GluForward {
  Dtype dtype;
  GluActivation activation;
  const void *gate, *up;
  int64_t gate_stride, up_stride;
  void* y;
  int64_t channels;
  bool stream;    // y is larger than the cache
  bool prefetch;  // rows are long and have gaps between them, where the processor's own prefetching starts over
};

struct GluBackward {
  Dtype dtype;
  GluActivation activation;
  const void *grad, *gate, *up;
  int64_t grad_stride, gate_stride, up_stride;
  void *grad_gate, *grad_up;
  int64_t channels;
  bool stream, prefetch;
};

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

using Activation = GluActivation;

// tanh-gelu is x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh u) / 2 = sigmoid(2 u).
static inline Vec tanh_gelu_angle(Vec x, Vec squared) {  // 2 u
  return x * fma(squared, Vec(0.0713548162726009f), Vec(1.5957691216057308f));
}

template <Activation A>
static inline Vec activate(Vec x) {
  if constexpr (A == Activation::gelu_erf) {
    return x * fma(Vec(0.5f), erf(x * Vec(0.70710678118654752f)), Vec(0.5f));
  } else {
    // x / (1 + e^-z), not x sigmoid(z): one rounding less, and -0 where e^-z overflows.
    const Vec z = A == Activation::silu ? x : tanh_gelu_angle(x, x * x);
    return x / (Vec(1.f) + exp(Vec(0.f) - z));
  }
}

struct ValueAndSlope { Vec value, slope; };

// s = 1 / (1 + e^-z) and 1 - s as s e^-z, which does not cancel; the bound keeps 0 times inf from a hugely negative z.
struct Sigmoid {
  Vec value, rest;
  explicit Sigmoid(Vec z) {
    const Vec e = exp(Vec(0.f) - z);
    value = Vec(1.f) / (Vec(1.f) + e);
    rest = value * min(Vec(3e38f), e);
  }
};

template <Activation A>
static inline ValueAndSlope activate_with_slope(Vec x) {
  if constexpr (A == Activation::gelu_erf) {  // value x P(x), slope P(x) + x p(x), P and p of the normal distribution
    const Vec below = fma(Vec(0.5f), erf(x * Vec(0.70710678118654752f)), Vec(0.5f));
    const Vec density = Vec(0.3989422804014327f) * exp(Vec(-0.5f) * x * x);
    return {x * below, fma(x, density, below)};
  } else if constexpr (A == Activation::silu) {  // slope s + x s (1 - s)
    const Sigmoid s(x);
    const Vec value = x * s.value;
    return {value, fma(value, s.rest, s.value)};
  } else {  // slope s + x s (1 - s) (2 u)'; the bound keeps a huge finite x from 0 times inf
    const Vec squared = min(Vec(1e30f), x * x);
    const Sigmoid s(tanh_gelu_angle(x, squared));
    const Vec value = x * s.value;
    const Vec angle_slope = fma(squared, Vec(0.2140644488178027f), Vec(1.5957691216057308f));
    return {value, fma(value * s.rest, angle_slope, s.value)};
  }
}

// Elements up to the next one of `out` that is aligned to a whole vector, at most n: where streaming can start.
template <class T>
static inline int unaligned_head(const T* out, int64_t n) {
  const uintptr_t bytes = Vec::W * sizeof(T), past = uintptr_t(out) % bytes;
  return int(std::min<int64_t>(n, past ? (bytes - past) / sizeof(T) : 0));
}

// Asks for the piece after the next one of a row, the beginning of the next row included; a prefetch never faults.
template <class T>
static inline void prefetch_ahead(const void* data, int64_t stride, int64_t channels, int64_t row, int64_t column) {
  column += 2 * glu_piece;
  if (column >= channels) column -= channels, ++row;
  const T* p = (const T*)data + row * stride + column;
  for (int64_t i = 0; i < glu_piece; i += 64 / sizeof(T)) __builtin_prefetch(p + i);
}

// Calls f(row, column, count, offset in the output) over [begin, end), in stretches that lie within a row.
template <class F>
static inline __attribute__((always_inline)) void for_each_stretch(int64_t channels, int64_t longest, int64_t begin,
                                                                   int64_t end, F&& f) {
  int64_t row = begin / channels, column = begin % channels;
  for (int64_t at = begin; at < end;) {
    const int64_t count = std::min({channels - column, end - at, longest});
    f(row, column, count, at);
    at += count;
    column += count;
    if (column == channels) column = 0, ++row;
  }
}

template <class T, Activation A>
static void forward_range(const GluForward& p, int64_t begin, int64_t end) {
  for_each_stretch(p.channels, p.prefetch ? glu_piece : end, begin, end, [&](int64_t row, int64_t column, int64_t count,
                                                                         int64_t at) {
    if (p.prefetch) {
      prefetch_ahead<T>(p.gate, p.gate_stride, p.channels, row, column);
      prefetch_ahead<T>(p.up, p.up_stride, p.channels, row, column);
    }
    const T* gate = (const T*)p.gate + row * p.gate_stride + column;
    const T* up = (const T*)p.up + row * p.up_stride + column;
    T* y = (T*)p.y + at;
    const auto step = [&](int64_t j, int lanes, bool streamed) {
      const Vec v = activate<A>(load(gate + j, lanes)) * load(up + j, lanes);
      streamed ? stream(y + j, v, lanes) : store(y + j, v, lanes);
    };
    const int head = p.stream ? unaligned_head(y, count) : 0;
    if (head) step(0, head, false);
    for_each_vector(count - head, [&](int64_t j, int lanes) { step(head + j, lanes, p.stream); });
  });
  if (p.stream) stream_fence();
}

// grad_up = grad act(gate), grad_gate = grad up act'(gate).
template <class T, Activation A>
static void backward_range(const GluBackward& p, int64_t begin, int64_t end) {
  for_each_stretch(p.channels, p.prefetch ? glu_piece : end, begin, end, [&](int64_t row, int64_t column, int64_t count,
                                                                         int64_t at) {
    if (p.prefetch) {
      prefetch_ahead<T>(p.grad, p.grad_stride, p.channels, row, column);
      prefetch_ahead<T>(p.gate, p.gate_stride, p.channels, row, column);
      prefetch_ahead<T>(p.up, p.up_stride, p.channels, row, column);
    }
    const T* grad = (const T*)p.grad + row * p.grad_stride + column;
    const T* gate = (const T*)p.gate + row * p.gate_stride + column;
    const T* up = (const T*)p.up + row * p.up_stride + column;
    T *grad_gate = (T*)p.grad_gate + at, *grad_up = (T*)p.grad_up + at;
    const auto step = [&](int64_t j, int lanes, bool streamed) {
      const Vec g = load(grad + j, lanes);
      const auto [value, slope] = activate_with_slope<A>(load(gate + j, lanes));
      const Vec to_gate = g * load(up + j, lanes) * slope, to_up = g * value;
      streamed ? stream(grad_gate + j, to_gate, lanes) : store(grad_gate + j, to_gate, lanes);
      streamed ? stream(grad_up + j, to_up, lanes) : store(grad_up + j, to_up, lanes);
    };
    const int head = p.stream ? unaligned_head(grad_gate, count) : 0;
    const bool streamed = p.stream && unaligned_head(grad_up, count) == head;
    if (head) step(0, head, false);
    for_each_vector(count - head, [&](int64_t j, int lanes) { step(head + j, lanes, streamed); });
  });
  if (p.stream) stream_fence();
}

void glu_forward(const GluForward& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (p.activation) {
      case Activation::silu: return forward_range<T, Activation::silu>(p, begin, end);
      case Activation::gelu_tanh: return forward_range<T, Activation::gelu_tanh>(p, begin, end);
      case Activation::gelu_erf: return forward_range<T, Activation::gelu_erf>(p, begin, end);
    }
  });
}
void glu_backward(const GluBackward& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) {
    using T = decltype(t);
    switch (p.activation) {
      case Activation::silu: return backward_range<T, Activation::silu>(p, begin, end);
      case Activation::gelu_tanh: return backward_range<T, Activation::gelu_tanh>(p, begin, end);
      case Activation::gelu_erf: return backward_range<T, Activation::gelu_erf>(p, begin, end);
    }
  });
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, glu_forward, (const GluForward&, int64_t, int64_t))
FASTLLM_KERNEL(void, glu_backward, (const GluBackward&, int64_t, int64_t))

// A tensor seen as rows of contiguous channels with one stride between rows; copied only where its layout is not that.
struct Rows {
  Tensor tensor;
  int64_t stride;
};

static int64_t channels_of(const Tensor& t) { return t.dim() ? t.size(t.dim() - 1) : 1; }

static Rows rows_of(const Tensor& t) {
  const int64_t channels = channels_of(t);
  if (t.is_contiguous()) return {t, channels};
  int64_t stride = channels, inner_rows = 1;
  bool regular = channels == 1 || t.stride(t.dim() - 1) == 1;
  for (int64_t d = t.dim() - 2; d >= 0 && regular; --d) {
    if (t.size(d) == 1) continue;
    if (inner_rows == 1) stride = t.stride(d);
    regular = t.stride(d) == stride * inner_rows;
    inner_rows *= t.size(d);
  }
  return regular ? Rows{t, stride} : Rows{torch::stable::contiguous(t), channels};
}

// Work per element in units of parts_for: an exponential and a division weigh about as much as eight loads.
constexpr int64_t glu_work = 8;

Tensor glu(Tensor gate_in, Tensor up_in, int64_t activation) {
  const Rows gate = rows_of(gate_in), up = rows_of(up_in);
  Tensor y = fresh_like(gate.tensor);
  const int64_t n = y.numel();
  if (n == 0) return y;
  int64_t channels = channels_of(y);
  if (gate.stride == channels && up.stride == channels) channels = n;  // dense: one long row, no short vectors inside
  const GluForward p{dtype_of(y), GluActivation(activation), gate.tensor.const_data_ptr(), up.tensor.const_data_ptr(),
                     gate.stride, up.stride, y.mutable_data_ptr(), channels,
                     n * int64_t(y.element_size()) >= stream_bytes, channels < n && channels >= 2 * glu_piece};
  const auto kernel = FASTLLM_PICK(glu_forward);
  parallel_parts(n, parts_for(n, glu_work), [&](int64_t, int64_t b, int64_t e) { kernel(p, b, e); });
  return y;
}

std::tuple<Tensor, Tensor> glu_backward(Tensor grad_in, Tensor gate_in, Tensor up_in, int64_t activation) {
  const Rows grad = rows_of(grad_in), gate = rows_of(gate_in), up = rows_of(up_in);
  Tensor grad_gate = fresh_like(gate.tensor), grad_up = fresh_like(gate.tensor);
  const int64_t n = grad_gate.numel();
  if (n == 0) return {grad_gate, grad_up};
  int64_t channels = channels_of(grad_gate);
  if (grad.stride == channels && gate.stride == channels && up.stride == channels) channels = n;
  const GluBackward p{dtype_of(gate.tensor), GluActivation(activation), grad.tensor.const_data_ptr(),
                      gate.tensor.const_data_ptr(), up.tensor.const_data_ptr(), grad.stride, gate.stride, up.stride,
                      grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr(), channels,
                      n * int64_t(grad_gate.element_size()) >= stream_bytes, channels < n && channels >= 2 * glu_piece};
  const auto kernel = FASTLLM_PICK(glu_backward);
  parallel_parts(n, parts_for(n, glu_work), [&](int64_t, int64_t b, int64_t e) { kernel(p, b, e); });
  return {grad_gate, grad_up};
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("glu", TORCH_BOX(&fastllm::glu));
  m.impl("glu_backward", TORCH_BOX(&fastllm::glu_backward));
}
#endif  // FASTLLM_BINDING
