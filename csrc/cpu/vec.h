// One fp32 vector type over baseline C++, AVX2 and AVX-512, for kernels that are compiled once per instruction set.
//
// A kernel file is compiled with -DFASTLLM_ISA=<name>; everything in it lives in namespace fastllm::<name>, so that
// four versions of the same code stand in one library. Kernels read and write fp32, bf16 or fp16 and compute in fp32.
// This header knows nothing of torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastllm {

enum class Dtype { f32, bf16, f16 };
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

// Calls f with a value of the C++ type that `dtype` names: dispatch(dtype, [&](auto t) { using T = decltype(t); ... }).
template <class F>
inline void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: f(float{}); break;
    case Dtype::bf16: f(bf16{}); break;
    case Dtype::f16: f(f16{}); break;
  }
}

}  // namespace fastllm

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// ---- scalar conversions ----------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));  // inf, nan
  if (magnitude >= 0x0400) return bits_to_float(sign | ((magnitude << 13) + 0x38000000));
  return bits_to_float(sign | float_to_bits(float(magnitude) * 0x1p-24f));  // zero, subnormal
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffff) > 0x7f800000) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <> inline f16 from_float<f16>(float x) {
  const uint32_t u = float_to_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return f16{uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return f16{uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                      // subnormal half: let fp32 addition round
    return f16{uint16_t(sign | uint16_t(float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000))};
  }
  return f16{uint16_t(sign | uint16_t((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
}

// ---- the vector ------------------------------------------------------------------------------------------------
// Vec::W fp32 lanes. load(p, n) fills lanes n.. with zero; store(p, n) writes the first n lanes (0 < n <= W).
// stream() is a store that goes round the cache, for outputs larger than it; p must be aligned to the bytes written.
// max(a, b) returns b where either is NaN, so write max(running, x) to let a NaN through and max(x, running) to drop it.

#if defined(__AVX512F__)

struct Vec {
  static constexpr int W = 16;
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}

  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static Vec load(const bf16* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const bf16* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Vec load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const f16* p, int n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, narrow_bf16(v)); }
  void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(v)); }
  void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, narrow_f16(v)); }
  void store(f16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow_f16(v)); }

  void stream(float* p) const { _mm512_stream_ps(p, v); }
  void stream(bf16* p) const { _mm256_stream_si256((__m256i*)p, narrow_bf16(v)); }
  void stream(f16* p) const { _mm256_stream_si256((__m256i*)p, narrow_f16(v)); }

  float sum() const { return _mm512_reduce_add_ps(v); }
  float largest() const { return _mm512_reduce_max_ps(v); }

 private:
  static Vec widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
  static __m256i narrow_f16(__m512 x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m256i narrow_bf16(__m512 x) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
#endif
  }
};
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }  // a b + c
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }  // a 2^n, n whole
// a < b ? yes : no, lane by lane; no where either is NaN.
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
}
inline Vec swap_pairs(Vec a) { return _mm512_permute_ps(a.v, 0xb1); }  // lanes 1, 0, 3, 2, ...
// The sums of sixteen vectors, one in each lane: half the lanes of a pair are added at each of four steps.
#define FASTLLM_SUMS_AT_ONCE 16
inline Vec sums(const Vec* v) {
  __m512 two[8], four[4], eight[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = v[2 * i].v, b = v[2 * i + 1].v;
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88), _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}
// Lanes n.. of a replaced by `fill`.
inline Vec keep_first(Vec a, int n, float fill) { return _mm512_mask_blend_ps(Vec::first(n), _mm512_set1_ps(fill), a.v); }

#elif defined(__AVX2__)

struct Vec {
  static constexpr int W = 8;
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  static Vec load(const bf16* p) { return widen_bf16(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load(const bf16* p, int n) { return widen_bf16(partial(p, n)); }
  static Vec load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load(const f16* p, int n) { return _mm256_cvtph_ps(partial(p, n)); }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, narrow_bf16(v)); }
  void store(bf16* p, int n) const { write(p, narrow_bf16(v), n); }
  void store(f16* p) const { _mm_storeu_si128((__m128i*)p, narrow_f16(v)); }
  void store(f16* p, int n) const { write(p, narrow_f16(v), n); }

  void stream(float* p) const { _mm256_stream_ps(p, v); }
  void stream(bf16* p) const { _mm_stream_si128((__m128i*)p, narrow_bf16(v)); }
  void stream(f16* p) const { _mm_stream_si128((__m128i*)p, narrow_f16(v)); }

  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  float largest() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

 private:
  static Vec widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
  static __m128i narrow_f16(__m256 x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m128i narrow_bf16(__m256 x) {
    const __m256i u = _mm256_castps_si256(x), high = _mm256_srli_epi32(u, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(r, quiet, nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(chosen, chosen), 0x08);
    return _mm256_castsi256_si128(packed);
  }
  static __m128i partial(const void* p, int n) {
    alignas(16) uint16_t b[8] = {};
    std::memcpy(b, p, size_t(n) * 2);
    return _mm_load_si128((const __m128i*)b);
  }
  static void write(void* p, __m128i h, int n) {
    alignas(16) uint16_t b[8];
    _mm_store_si128((__m128i*)b, h);
    std::memcpy(p, b, size_t(n) * 2);
  }
};
inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power_of_two(Vec a, Vec n) {  // in two steps, so that 2^n itself need not be representable
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a.v, x), y);
}
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
inline Vec swap_pairs(Vec a) { return _mm256_permute_ps(a.v, 0xb1); }
inline Vec keep_first(Vec a, int n, float fill) {
  return _mm256_blendv_ps(_mm256_set1_ps(fill), a.v, _mm256_castsi256_ps(Vec::first(n)));
}

#else

struct Vec {
  static constexpr int W = 8;
  float v[W];
  Vec() = default;
  Vec(float x) { for (float& e : v) e = x; }

  template <class T> static Vec load(const T* p) { Vec r; for (int i = 0; i < W; ++i) r.v[i] = to_float(p[i]); return r; }
  template <class T> static Vec load(const T* p, int n) {
    Vec r(0.f);
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T> void store(T* p) const { for (int i = 0; i < W; ++i) p[i] = from_float<T>(v[i]); }
  template <class T> void store(T* p, int n) const { for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]); }
  template <class T> void stream(T* p) const { store(p); }
  float sum() const { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
  float largest() const { float m = v[0]; for (int i = 1; i < W; ++i) m = m > v[i] ? m : v[i]; return m; }
};
#define FASTLLM_LANES(expression) Vec r; for (int i = 0; i < Vec::W; ++i) r.v[i] = (expression); return r;
inline Vec operator+(Vec a, Vec b) { FASTLLM_LANES(a.v[i] + b.v[i]) }
inline Vec operator-(Vec a, Vec b) { FASTLLM_LANES(a.v[i] - b.v[i]) }
inline Vec operator*(Vec a, Vec b) { FASTLLM_LANES(a.v[i] * b.v[i]) }
inline Vec operator/(Vec a, Vec b) { FASTLLM_LANES(a.v[i] / b.v[i]) }
inline Vec max(Vec a, Vec b) { FASTLLM_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
inline Vec min(Vec a, Vec b) { FASTLLM_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
inline Vec fma(Vec a, Vec b, Vec c) { FASTLLM_LANES(a.v[i] * b.v[i] + c.v[i]) }
inline Vec round(Vec a) { FASTLLM_LANES(std::nearbyint(a.v[i])) }
inline Vec scale_by_power_of_two(Vec a, Vec n) { FASTLLM_LANES(std::ldexp(a.v[i], int(n.v[i]))) }
inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { FASTLLM_LANES(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]) }
inline Vec swap_pairs(Vec a) { FASTLLM_LANES(a.v[i ^ 1]) }
inline Vec keep_first(Vec a, int n, float fill) { FASTLLM_LANES(i < n ? a.v[i] : fill) }
#undef FASTLLM_LANES

#endif

inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }

// e^x to about 1 ulp: x = n ln 2 + r with |r| <= ln 2 / 2, a degree-6 polynomial in r, times 2^n.
// Overflows to inf above 88.73, underflows to 0 below about -104; NaN stays NaN.
// beyond_linear: e^x - 1 - x, to 2e-7 of it where n = 0 and the polynomial holds it apart, to 2e-6 elsewhere.
inline Vec exp(Vec x, Vec& beyond_linear) {
  const Vec within = min(Vec(89.f), max(Vec(-105.f), x));
  const Vec n = round(within * Vec(1.44269504088896341f));
  Vec r = fma(n, Vec(-0.693359375f), within);
  r = fma(n, Vec(2.12194440e-4f), r);
  Vec p(1.9875691500e-4f);
  p = fma(p, r, Vec(1.3981999507e-3f));
  p = fma(p, r, Vec(8.3334519073e-3f));
  p = fma(p, r, Vec(4.1665795894e-2f));
  p = fma(p, r, Vec(1.6666665459e-1f));
  p = fma(p, r, Vec(5.0000001201e-1f));
  const Vec square = r * r, e = scale_by_power_of_two(fma(p, square, r + Vec(1.f)), n);
  beyond_linear = where_less(n * n, Vec(0.5f), p * square, (e - Vec(1.f)) - x);
  return e;
}
inline Vec exp(Vec x) {
  Vec beyond_linear;
  return exp(x, beyond_linear);
}
// 2^x to about 2 ulp for x up to 127; 0 below about -150, -inf included; NaN stays NaN. The degree-5 polynomial fits 2^f over
// |f| <= 1/2 to 7.5e-8 relative (weighted least squares, reweighted towards the minimax).
inline Vec exp2(Vec x) {
  x = max(Vec(-160.f), x);
  const Vec n = round(x), f = x - n;
  Vec p(0.0013276472f);
  p = fma(p, f, Vec(0.0096755415f));
  p = fma(p, f, Vec(0.0555071328f));
  p = fma(p, f, Vec(0.240221197f));
  p = fma(p, f, Vec(0.693146967f));
  p = fma(p, f, Vec(1.00000007f));
  return scale_by_power_of_two(p, n);
}
inline Vec sigmoid(Vec x) { return Vec(1.f) / (Vec(1.f) + exp(Vec(0.f) - x)); }
// tanh(x) to 2 ulp: below 0.625, where the difference that serves beyond would cancel, an odd polynomial (Cephes tanhf).
inline Vec tanh(Vec x) {
  const Vec z = x * x;
  Vec p(-5.70498872745e-3f);
  p = fma(p, z, Vec(2.06390887954e-2f));
  p = fma(p, z, Vec(-5.37397155531e-2f));
  p = fma(p, z, Vec(1.33314422036e-1f));
  p = fma(p, z, Vec(-3.33332819422e-1f));
  return where_less(z, Vec(0.390625f), fma(p * z, x, x), Vec(2.f) * sigmoid(x + x) - Vec(1.f));
}

// erf(x) to 1.3 ulp. For |x| < 1, x + x P(x^2); beyond, 1 - e^(-|x| Q(|x|)) with the sign of x, which rounds to 1
// from 3.92 on. P fits erf(x) / x - 1 over [0, 1] to 1.2e-9 and Q fits -ln(erfc(x)) / x over [1, 4] to 4e-10, both
// relative to erf: weighted least squares on Chebyshev nodes, reweighted towards the minimax (Lawson), in 50 digits.
inline Vec erf(Vec x) {
  const Vec z = x * x;
  Vec p(7.85385419e-5f);
  p = fma(p, z, Vec(-8.01019138e-4f));
  p = fma(p, z, Vec(5.18832728e-3f));
  p = fma(p, z, Vec(-2.6853811e-2f));
  p = fma(p, z, Vec(1.12835854e-1f));
  p = fma(p, z, Vec(-3.7612626e-1f));
  p = fma(p, z, Vec(1.28379166e-1f));
  const Vec near = fma(p, x, x);
  const Vec size = max(Vec(0.f) - x, x), far = min(Vec(4.f), size);
  Vec q(1.3963011e-5f);
  q = fma(q, far, Vec(-3.50597664e-4f));
  q = fma(q, far, Vec(3.75749962e-3f));
  q = fma(q, far, Vec(-2.40101162e-2f));
  q = fma(q, far, Vec(1.0653092e-1f));
  q = fma(q, far, Vec(6.34969473e-1f));
  q = fma(q, far, Vec(1.1286943f));
  const Vec tail = exp(Vec(0.f) - far * q);
  return where_less(size, Vec(1.f), near, where_less(x, Vec(0.f), tail - Vec(1.f), Vec(1.f) - tail));
}

// Calls f(offset, lanes) over [0, n): whole vectors first (lanes == Vec::W, a constant after inlining), then one tail.
// Inside f use load(p, lanes) / store(p, lanes) below: they choose the unmasked form for whole vectors.
template <class F>
inline __attribute__((always_inline)) void for_each_vector(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + Vec::W <= n; i += Vec::W) f(i, Vec::W);
  if (i < n) f(i, int(n - i));
}
template <class T> inline Vec load(const T* p, int lanes) { return lanes == Vec::W ? Vec::load(p) : Vec::load(p, lanes); }
template <class T> inline void store(T* p, Vec v, int lanes) { lanes == Vec::W ? v.store(p) : v.store(p, lanes); }
template <class T> inline void stream(T* p, Vec v, int lanes) { lanes == Vec::W ? v.stream(p) : v.store(p, lanes); }

// Makes streamed stores visible to other threads; call once at the end of a range that used stream().
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA
