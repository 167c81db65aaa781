// Matrix products of blocks that live in the cache, C (m x n, fp32) = or += A (m x k) B (k x n), and the packing of their
// operands.
//
// k is counted in units of four bytes: one fp32 number or, where the processor multiplies pairs of bf16, two neighbours
// along k. A is read where it lies, one unit at a time, with any strides. B lies in panels of `panel` columns: for each k,
// the units of the panel's columns side by side. Two packings make panels out of rows of tokens:
//   across(rows): tokens are the columns, k runs along their channels (scores = queries times keys)
//   along(rows):  channels are the columns, k runs over the tokens      (outputs = weights times values)
#pragma once

#include "vec.h"

#ifdef FASTLLM_ISA
namespace fastllm {
namespace FASTLLM_ISA {

// The type blocks of T are multiplied in, and how many of them make a unit.
template <class T> struct Operand { using type = float; static constexpr int per_unit = 1; };
#if defined(__AVX512BF16__)
template <> struct Operand<bf16> { using type = bf16; static constexpr int per_unit = 2; };
#endif

#if defined(__AVX512F__)
constexpr int tile_rows = 6, tile_vectors = 4;
#elif defined(__AVX2__)
constexpr int tile_rows = 6, tile_vectors = 2;
#else
constexpr int tile_rows = 2, tile_vectors = 2;
#endif
constexpr int panel = tile_vectors * Vec::W;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t round_down(int64_t n, int64_t multiple) { return n / multiple * multiple; }

inline Vec one_unit(const float* p) { float f; std::memcpy(&f, p, 4); return Vec(f); }

template <int PerUnit>
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512BF16__)
  if constexpr (PerUnit == 2) return _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v);
#endif
  return fma(a, b, c);
}

template <int PerUnit, int Rows, int Vectors>
static void tile(const float* a, int64_t row_step, int64_t k_step, const float* b, int64_t k, float* c, int64_t c_step,
                 bool add) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Vec(0.f);
  for (int64_t i = 0; i < k; ++i, a += k_step, b += panel) {
    Vec column[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) column[v] = Vec::load(b + v * Vec::W);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec one = one_unit(a + r * row_step);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = multiply_add<PerUnit>(one, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      float* at = c + r * c_step + v * Vec::W;
      (add ? sum[r][v] + Vec::load(at) : sum[r][v]).store(at);
    }
}

template <int PerUnit, int Vectors, int Rows = tile_rows>
inline void tiles_down(int64_t m, const float* a, int64_t row_step, int64_t k_step, const float* b, int64_t k, float* c,
                       int64_t c_step, bool add) {
  for (; m >= Rows; m -= Rows, a += Rows * row_step, c += Rows * c_step) {
    tile<PerUnit, Rows, Vectors>(a, row_step, k_step, b, k, c, c_step, add);
  }
  if constexpr (Rows > 1) {
    if (m) tiles_down<PerUnit, Vectors, Rows - 1>(m, a, row_step, k_step, b, k, c, c_step, add);
  }
}

template <int PerUnit, int Vectors = tile_vectors>
inline void tiles_of(int64_t vectors, int64_t m, const float* a, int64_t row_step, int64_t k_step, const float* b,
                     int64_t k, float* c, int64_t c_step, bool add) {
  if (vectors == Vectors) return tiles_down<PerUnit, Vectors>(m, a, row_step, k_step, b, k, c, c_step, add);
  if constexpr (Vectors > 1) tiles_of<PerUnit, Vectors - 1>(vectors, m, a, row_step, k_step, b, k, c, c_step, add);
}

// C (m x columns) of A and packed B. columns is rounded up to whole vectors: C needs the room.
template <int PerUnit>
static void product(int64_t m, int64_t columns, int64_t k, const void* a, int64_t row_step, int64_t k_step, const float* b,
                    int64_t panel_size, float* c, int64_t c_step, bool add) {
  for (int64_t vectors = round_up(columns, Vec::W) / Vec::W; vectors > 0; vectors -= tile_vectors) {
    const int64_t here = vectors < tile_vectors ? vectors : tile_vectors;
    tiles_of<PerUnit>(here, m, (const float*)a, row_step, k_step, b, k, c, c_step, add);
    b += panel_size, c += here * Vec::W;
  }
}

inline float pair_of(bf16 low, bf16 high) { return bits_to_float(uint32_t(low.bits) | uint32_t(high.bits) << 16); }

// `count` tokens of `channels` each, `step` elements apart, into panels of whole `panel` tokens; the missing are zero.
// out: panels of channels / per_unit * panel floats.
template <class T>
static void across(const T* rows, int64_t step, int64_t count, int64_t channels, float* out) {
  constexpr int per_unit = Operand<T>::per_unit;
  const int64_t k = channels / per_unit;
  for (int64_t first = 0; first < count; first += panel, out += k * panel) {
    const int64_t tokens = count - first < panel ? count - first : panel;
    for (int64_t lane = 0; lane < tokens; ++lane) {
      const T* row = rows + (first + lane) * step;
      float* to = out + lane;
      if constexpr (per_unit == 2) {
        for (int64_t i = 0; i < k; ++i) std::memcpy(to + i * panel, row + 2 * i, 4);
      } else {
        for (int64_t i = 0; i < k; ++i) to[i * panel] = to_float(row[i]);
      }
    }
    if (tokens < panel) {
      for (int64_t i = 0; i < k; ++i)
        for (int64_t lane = tokens; lane < panel; ++lane) out[i * panel + lane] = 0.f;
    }
  }
}

// The same tokens with their channels as columns, up to whole vectors; tokens beyond `count`, up to `room` (whole units),
// are zero. out: panels `panel_size` floats apart.
template <class T>
static void along(const T* rows, int64_t step, int64_t count, int64_t room, int64_t channels, float* out,
                  int64_t panel_size) {
  constexpr int per_unit = Operand<T>::per_unit;
  for (int64_t first = 0; first < channels; first += panel, out += panel_size) {
    const int64_t here = channels - first < panel ? channels - first : panel;
    const int64_t padded = round_up(here, Vec::W);
    for (int64_t t = 0; t < room; t += per_unit) {
      float* to = out + t / per_unit * panel;
      if constexpr (per_unit == 2) {
        const T* low = rows + t * step + first;
        const T* high = low + step;
        if (t + 1 < count) {
          for (int64_t i = 0; i < here; ++i) to[i] = pair_of(low[i], high[i]);
        } else {
          for (int64_t i = 0; i < here; ++i) to[i] = t < count ? pair_of(low[i], T{0}) : 0.f;
        }
      } else {
        const T* row = rows + t * step + first;
        for (int64_t i = 0; i < here; ++i) to[i] = t < count ? to_float(row[i]) : 0.f;
      }
      for (int64_t i = here; i < padded; ++i) to[i] = 0.f;
    }
  }
}

}  // namespace FASTLLM_ISA
}  // namespace fastllm
#endif  // FASTLLM_ISA
