// What the binding half of every CPU op shares: the run-time choice of instruction set, dtypes, fresh outputs, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "vec.h"

namespace fastllm {

using torch::stable::Tensor;

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
Isa isa();  // library.cpp: what this processor has, lowered by FASTLLM_CPU_CAPABILITY

// FASTLLM_KERNEL(void, name, (args)) declares a kernel that every instruction set defines; FASTLLM_PICK(name) is the
// one for this processor.
#if defined(FASTLLM_X86)
#define FASTLLM_KERNEL(ret, name, args) \
  namespace baseline { ret name args; } \
  namespace avx2 { ret name args; }     \
  namespace avx512 { ret name args; }   \
  namespace avx512_bf16 { ret name args; }
#define FASTLLM_PICK(name)                                                            \
  (::fastllm::isa() == Isa::avx512_bf16 ? avx512_bf16::name                           \
       : ::fastllm::isa() == Isa::avx512 ? avx512::name                               \
             : ::fastllm::isa() == Isa::avx2 ? avx2::name : baseline::name)
#else
#define FASTLLM_KERNEL(ret, name, args) namespace baseline { ret name args; }
#define FASTLLM_PICK(name) baseline::name
#endif

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return Dtype::f32;
    case torch::headeronly::ScalarType::BFloat16: return Dtype::bf16;
    case torch::headeronly::ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "fastllm: the C++ kernels take float32, bfloat16 and float16 tensors");
  }
  return Dtype::f32;
}

// Asks the kernel for huge pages under a large fresh buffer: first-touch faults otherwise cost more than the op itself.
void advise_huge_pages(void* data, size_t bytes);

// On the CPU, as all tensors of these kernels are: torch::stable::new_empty asks the dispatcher twice.
inline Tensor fresh(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<int32_t> dtype = {}) {
  int32_t as_like = 0;
  if (!dtype) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &as_like));
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         dtype.value_or(as_like), aoti_torch_device_type_cpu(), 0, &made));
  Tensor t(made);
  advise_huge_pages(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size());
  return t;
}
// A fresh contiguous tensor of the same shape.
inline Tensor fresh_like(const Tensor& like) { return fresh(like, like.sizes()); }
inline Tensor fresh_float(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  return fresh(like, sizes, aoti_torch_dtype_float32());
}

// The tensor itself where it is contiguous already: asking the dispatcher costs more than a small kernel.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// f(begin, end) of each packed sequence, after the check that they fill the tokens.
template <class F>
void for_each_sequence(const Tensor& cu_seqlens, int64_t tokens, F f) {
  const Tensor bounds = dense(cu_seqlens);
  const int32_t* b = (const int32_t*)bounds.const_data_ptr();
  const int64_t count = bounds.numel() - 1;
  STD_TORCH_CHECK(count >= 0 && b[0] == 0 && b[count] == tokens, "fastllm: cu_seqlens must go from 0 to the number of tokens");
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(b[i] <= b[i + 1], "fastllm: cu_seqlens must ascend");
    f(b[i], b[i + 1]);
  }
}

inline Tensor to_float(const Tensor& t) {
  return torch::stable::contiguous(torch::stable::to(t, torch::headeronly::ScalarType::Float));
}

// Outputs past this size are written round the cache (Vec::stream): nothing reads them back before they would be evicted.
constexpr int64_t stream_bytes = int64_t(8) << 20;

// Splits [0, n) into at most one range per thread and calls f(part, begin, end): `part` indexes per-thread partial sums,
// and the split depends on n and the thread count alone, so results repeat from run to run.
inline int64_t parts_for(int64_t n, int64_t work_per_item) {
  const int64_t least = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work_per_item));
  return std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), n / least));
}
template <class F>
void parallel_parts(int64_t n, int64_t parts, const F& f) {
  if (parts == 1) return f(int64_t(0), int64_t(0), n);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t b, int64_t e) {
    for (int64_t p = b; p < e; ++p) f(p, n * p / parts, n * (p + 1) / parts);
  });
}

// Sums over rows, as weight gradients are: few rows at a time into a block of n floats, then the block into the total. The
// rounding error grows with the rows of a block and the number of blocks, not with their product.
constexpr int64_t rows_per_block = 64;
inline void add_block(float* total, float* block, int64_t n) {
  for (int64_t i = 0; i < n; ++i) total[i] += block[i], block[i] = 0.f;
}

}  // namespace fastllm
