// Rotary position embedding of q and k in one pass, from tables or from positions, either layout, and its transpose.
//
// A pair (x1, x2) becomes (x1 c1 + x2 u, x2 c2 + x1 w) with u = -s1, w = s2; the transpose, which is the backward pass,
// has u = s2, w = -s1. The cosines and the u, w of one token are made once and serve all its heads.
#include "vec.h"

#include <cstdlib>

namespace fastllm {

struct RopeTensor {
  const void* x;  // (batch, heads, length, dim), last stride 1
  void* y;        // the same shape, last stride 1
  int64_t heads;
  int64_t x_batch, x_head, x_token;  // strides
  int64_t y_batch, y_head, y_token;
};

struct Rope {
  Dtype dtype, table_dtype;
  RopeTensor parts[2];                // q and k
  int64_t length, dim, rotated;
  const void *cos, *sin;              // (batch or 1, length, rotated), last stride 1; null: made from positions
  int64_t cos_batch, cos_token, sin_batch, sin_token;
  const int64_t* positions;           // (batch or 1, length)
  int64_t position_batch, position_token;
  const double* inv_freq;             // (rotated / 2,); double, for a caller's double would not survive fp32 at far positions
  float attention_factor;
  bool interleaved, transposed;
  bool stream;                        // the outputs are larger than the cache
};

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// sin and cos of position * inv_freq. The product and its reduction to [-pi/4, pi/4] are in double, so the phase is right to
// the last bit of fp32 at any position; what is left is two short polynomials (Cephes sinf, cosf) and a choice by quadrant.
static void angles(int64_t position, const double* inv_freq, int64_t n, float factor, float* cos, float* sin) {
  constexpr double two_over_pi = 0.63661977236758134308, half_pi = 1.57079632679489661923;
  for (int64_t i = 0; i < n; ++i) {
    const double angle = double(position) * inv_freq[i];
    const double turns = std::rint(angle * two_over_pi);
    const float r = float(angle - turns * half_pi), z = r * r;
    const int quadrant = int(turns - 4.0 * std::floor(turns * 0.25));
    const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    const float c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.f;
    const float a = quadrant & 1 ? s : c, b = quadrant & 1 ? c : s;
    cos[i] = factor * (quadrant == 1 || quadrant == 2 ? -a : a);
    sin[i] = factor * (quadrant >= 2 ? -b : b);
  }
}

// Fills c (rotated,) with cosines and u (rotated,) with what the partner is multiplied by, in the layout's order.
template <class T>
static void coefficients(const Rope& p, int64_t batch, int64_t token, float* c, float* u) {
  const int64_t R = p.rotated, half = R / 2;
  float* s = u;  // the sines first, turned into u, w in place
  if (p.positions) {
    float* first_c = p.interleaved ? c + half : c;  // the interleaved form spreads them below, upwards from the upper half
    float* first_s = p.interleaved ? s + half : s;
    angles(p.positions[batch * p.position_batch + token * p.position_token], p.inv_freq, half, p.attention_factor, first_c, first_s);
    for (int64_t i = 0; i < half; ++i) {
      if (p.interleaved) {
        const float ci = c[half + i], si = s[half + i];
        c[2 * i] = c[2 * i + 1] = ci;
        s[2 * i] = s[2 * i + 1] = si;
      } else {
        c[half + i] = c[i];
        s[half + i] = s[i];
      }
    }
  } else {
    const T* cos = (const T*)p.cos + batch * p.cos_batch + token * p.cos_token;
    const T* sin = (const T*)p.sin + batch * p.sin_batch + token * p.sin_token;
    for_each_vector(R, [&](int64_t i, int lanes) {
      store(c + i, load(cos + i, lanes), lanes);
      store(s + i, load(sin + i, lanes), lanes);
    });
  }
  const int64_t step = p.interleaved ? 2 : 1, other = p.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    float &first = s[i * step], &second = s[i * step + other];
    const float s1 = first, s2 = second;
    first = p.transposed ? s2 : -s1;
    second = p.transposed ? -s1 : s2;
  }
}

template <class T>
static inline void put(T* y, Vec v, int lanes, bool round_cache) { round_cache ? stream(y, v, lanes) : store(y, v, lanes); }

template <class T>
static void rotate_row(const T* x, T* y, const float* c, const float* u, const Rope& p) {
  const int64_t R = p.rotated, half = R / 2;
  const bool aligned = p.stream && uintptr_t(y) % (Vec::W * sizeof(T)) == 0;
  if (p.interleaved) {
    for_each_vector(R, [&](int64_t i, int lanes) {
      const Vec v = load(x + i, lanes);
      put(y + i, fma(v, load(c + i, lanes), swap_pairs(v) * load(u + i, lanes)), lanes, aligned);
    });
  } else {
    const bool upper = aligned && half % Vec::W == 0;
    for_each_vector(half, [&](int64_t i, int lanes) {
      const Vec a = load(x + i, lanes), b = load(x + half + i, lanes);
      put(y + i, fma(a, load(c + i, lanes), b * load(u + i, lanes)), lanes, aligned);
      put(y + half + i, fma(b, load(c + half + i, lanes), a * load(u + half + i, lanes)), lanes, upper);
    });
  }
  if (R < p.dim) std::memcpy(y + R, x + R, size_t(p.dim - R) * sizeof(T));
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Tokens [begin, end) of batch * length. A block of tokens shares one fill of the tables' cache lines per head, so that
// either memory order, heads outside tokens or inside, is walked in long contiguous runs.
template <class T, class Table>
static void rotate_tokens(const Rope& p, int64_t begin, int64_t end) {
  constexpr int64_t block = 16;
  float* tables = (float*)std::malloc(size_t(2 * block * p.rotated + 16) * sizeof(float));
  for (int64_t first = begin; first < end;) {
    const int64_t batch = first / p.length, token = first % p.length;
    const int64_t count = smaller(block, smaller(end - first, p.length - token));
    for (int64_t t = 0; t < count; ++t) {
      float* c = tables + 2 * t * p.rotated;
      coefficients<Table>(p, batch, token + t, c, c + p.rotated);
    }
    for (const RopeTensor& part : p.parts) {
      const T* x = (const T*)part.x + batch * part.x_batch + token * part.x_token;
      T* y = (T*)part.y + batch * part.y_batch + token * part.y_token;
      const bool heads_inside = part.x_head < part.x_token;
      const int64_t outer = heads_inside ? count : part.heads, inner = heads_inside ? part.heads : count;
      for (int64_t i = 0; i < outer; ++i) {
        for (int64_t j = 0; j < inner; ++j) {
          const int64_t t = heads_inside ? i : j, h = heads_inside ? j : i;
          const float* c = tables + 2 * t * p.rotated;
          rotate_row(x + h * part.x_head + t * part.x_token, y + h * part.y_head + t * part.y_token, c, c + p.rotated, p);
        }
      }
    }
    first += count;
  }
  std::free(tables);
  if (p.stream) stream_fence();
}

void rope(const Rope& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto t) {
    dispatch(p.table_dtype, [&](auto table) { rotate_tokens<decltype(t), decltype(table)>(p, begin, end); });
  });
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA

#ifdef FASTLLM_BINDING
#include "binding.h"

namespace fastllm {

FASTLLM_KERNEL(void, rope, (const Rope&, int64_t, int64_t))

static Tensor last_dim_contiguous(const Tensor& t) {
  return t.numel() && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

static std::tuple<Tensor, Tensor> run(Rope p, Tensor q, Tensor k) {
  Tensor inputs[2] = {last_dim_contiguous(q), last_dim_contiguous(k)};
  Tensor outputs[2];
  p.dtype = dtype_of(q);
  p.length = q.size(2);
  p.dim = q.size(3);
  int64_t bytes = 0, heads = 0;
  for (int i = 0; i < 2; ++i) {
    const Tensor& x = inputs[i];
    Tensor y = torch::stable::empty_like(x);
    advise_huge_pages(y.mutable_data_ptr(), size_t(y.numel()) * y.element_size());
    p.parts[i] = {x.const_data_ptr(), y.mutable_data_ptr(), x.size(1), x.stride(0), x.stride(1), x.stride(2),
                  y.stride(0), y.stride(1), y.stride(2)};
    bytes += y.numel() * int64_t(y.element_size());
    heads += x.size(1);
    outputs[i] = y;
  }
  p.stream = bytes >= stream_bytes;
  const int64_t tokens = bytes ? q.size(0) * p.length : 0;
  const auto kernel = FASTLLM_PICK(rope);
  parallel_parts(tokens, parts_for(tokens, heads * p.dim), [&](int64_t, int64_t b, int64_t e) { kernel(p, b, e); });
  return {outputs[0], outputs[1]};
}

std::tuple<Tensor, Tensor> apply_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool transposed) {
  cos = last_dim_contiguous(cos);
  sin = last_dim_contiguous(sin);
  Rope p{};
  p.table_dtype = dtype_of(cos);
  p.rotated = cos.size(2);
  p.cos = cos.const_data_ptr();
  p.sin = sin.const_data_ptr();
  p.cos_batch = cos.size(0) == 1 ? 0 : cos.stride(0);
  p.cos_token = cos.stride(1);
  p.sin_batch = sin.size(0) == 1 ? 0 : sin.stride(0);
  p.sin_token = sin.stride(1);
  p.interleaved = interleaved;
  p.transposed = transposed;
  return run(p, q, k);
}

std::tuple<Tensor, Tensor> rope_from_positions(Tensor q, Tensor k, Tensor positions, Tensor inv_freq, double attention_factor,
                                               bool interleaved, bool transposed) {
  inv_freq = torch::stable::contiguous(torch::stable::to(inv_freq, torch::headeronly::ScalarType::Double));
  Rope p{};
  p.table_dtype = Dtype::f32;
  p.rotated = 2 * inv_freq.size(0);
  p.positions = (const int64_t*)positions.const_data_ptr();
  p.position_batch = positions.size(0) == 1 ? 0 : positions.stride(0);
  p.position_token = positions.stride(1);
  p.inv_freq = (const double*)inv_freq.const_data_ptr();
  p.attention_factor = float(attention_factor);
  p.interleaved = interleaved;
  p.transposed = transposed;
  return run(p, q, k);
}

}  // namespace fastllm

STABLE_TORCH_LIBRARY_IMPL(fastllm, CPU, m) {
  m.impl("apply_rope", TORCH_BOX(&fastllm::apply_rope));
  m.impl("rope", TORCH_BOX(&fastllm::rope_from_positions));
}
#endif  // FASTLLM_BINDING
