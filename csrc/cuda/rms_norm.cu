// y = x / rms(x) * (weight + weight_offset) and its gradients in CUDA C++, launched from C++.
//
// The same computation as csrc/cpu/rms_norm.cpp. A row is read once, in 16-byte packets that stay in registers; one of
// up to 1024 threads (32, four rows a block, for the short rows of a q or k norm) holds ITEMS packets of it. Rows that
// do not fit are read a second time, from the cache. Arithmetic is fp32, row offsets are 64-bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- device ----------------------------------------------------------------------------------------------------

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// N elements that one load instruction moves: 16 bytes, or one element where rows are not aligned to 16.
template <class T, int N>
struct alignas(sizeof(T) * N) Packet {
  T lane[N];
};

template <class T, int N>
__device__ inline Packet<T, N> read(const T* row, int packet) {
  return reinterpret_cast<const Packet<T, N>*>(row)[packet];
}

// The sum over the threads of one row: those of the warp where blockDim.x is 32, else those of the block.
__device__ inline float row_sum(float value, float* shared) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  if (blockDim.x == 32) return value;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the last row's sums have been read
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? shared[lane] : 0.f;
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The most threads along a row of the forward, and of the backward, which holds sums besides.
constexpr int forward_threads(int items) { return items == 1 ? 256 : items == 2 ? 512 : 1024; }
constexpr int backward_threads = 512;

// ITEMS packets a thread are kept in registers; 0: the row is longer than that and is read twice.
template <class T, int N, int ITEMS>
__global__ void __launch_bounds__(forward_threads(ITEMS))
    forward_kernel(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int channels, float eps,
                   float weight_offset) {
  __shared__ float shared[32];
  const int packets = channels / N;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += int64_t(gridDim.x) * blockDim.y) {
    const T* x_row = x + row * channels;
    Packet<T, N> held[ITEMS ? ITEMS : 1];
    float squares = 0.f;
    const auto add = [&](const Packet<T, N>& packet) {
#pragma unroll
      for (int i = 0; i < N; ++i) squares += widen(packet.lane[i]) * widen(packet.lane[i]);
    };
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int at = threadIdx.x + k * blockDim.x;
        if (at >= packets) continue;
        held[k] = read<T, N>(x_row, at);
        add(held[k]);
      }
    } else {
      for (int at = threadIdx.x; at < packets; at += blockDim.x) add(read<T, N>(x_row, at));
    }
    const float scale = 1.f / sqrtf(row_sum(squares, shared) / float(channels) + eps);
    if (threadIdx.x == 0) rstd[row] = scale;
    const auto write = [&](int at, const Packet<T, N>& from) {
      Packet<T, N> w, out;
      if (weight) w = read<T, N>(weight, at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float normed = widen(from.lane[i]) * scale;
        narrow(weight ? normed * (widen(w.lane[i]) + weight_offset) : normed, out.lane[i]);
      }
      reinterpret_cast<Packet<T, N>*>(y + row * channels)[at] = out;
    };
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int at = threadIdx.x + k * blockDim.x;
        if (at < packets) write(at, held[k]);
      }
    } else {
      for (int at = threadIdx.x; at < packets; at += blockDim.x) write(at, read<T, N>(x_row, at));
    }
  }
}

// With g = grad_y (weight + offset) and n = x rstd: grad_x = rstd (g - n mean(g n)); partial = sum of grad_y n over the
// rows of this lane of rows, one row of `partial` for each of the gridDim.x * blockDim.y lanes. ITEMS == 0: the sums do
// not fit in registers and are kept in `partial`, zeroed by the caller.
template <class T, int N, int ITEMS>
__global__ void __launch_bounds__(backward_threads, ITEMS == 1 ? 2 : 0)
    backward_kernel(const T* grad_y, const T* x, const T* weight, const float* rstd, T* grad_x, float* partial,
                    int64_t rows, int channels, float weight_offset) {
  __shared__ float shared[32];
  const int packets = channels / N;
  const int64_t lane = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, lanes = int64_t(gridDim.x) * blockDim.y;
  float* sums = partial + lane * channels;
  float total[ITEMS ? ITEMS * N : 1] = {};

  for (int64_t row = lane; row < rows; row += lanes) {
    const T *x_row = x + row * channels, *grad_row = grad_y + row * channels;
    const float scale = rstd[row];
    Packet<T, N> held_x[ITEMS ? ITEMS : 1], held_grad[ITEMS ? ITEMS : 1];
    float dot = 0.f;
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int at = threadIdx.x + k * blockDim.x;
        if (at >= packets) continue;
        held_x[k] = read<T, N>(x_row, at);
        held_grad[k] = read<T, N>(grad_row, at);
        Packet<T, N> w;
        if (weight) w = read<T, N>(weight, at);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float product = widen(held_grad[k].lane[i]) * widen(held_x[k].lane[i]) * scale;
          total[k * N + i] += product;
          dot += weight ? product * (widen(w.lane[i]) + weight_offset) : product;
        }
      }
    } else {
      for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        const float product = widen(grad_row[c]) * widen(x_row[c]) * scale;
        if (weight) sums[c] += product;
        dot += weight ? product * (widen(weight[c]) + weight_offset) : product;
      }
    }
    const float mean = row_sum(dot, shared) / float(channels);
    const auto write = [&](int at, const Packet<T, N>& from_x, const Packet<T, N>& from_grad) {
      Packet<T, N> w, out;
      if (weight) w = read<T, N>(weight, at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float grad = widen(from_grad.lane[i]);
        const float scaled = weight ? grad * (widen(w.lane[i]) + weight_offset) : grad;
        narrow(scale * (scaled - widen(from_x.lane[i]) * scale * mean), out.lane[i]);
      }
      reinterpret_cast<Packet<T, N>*>(grad_x + row * channels)[at] = out;
    };
    if constexpr (ITEMS > 0) {
#pragma unroll
      for (int k = 0; k < ITEMS; ++k) {
        const int at = threadIdx.x + k * blockDim.x;
        if (at < packets) write(at, held_x[k], held_grad[k]);
      }
    } else {
      for (int at = threadIdx.x; at < packets; at += blockDim.x) write(at, read<T, N>(x_row, at), read<T, N>(grad_row, at));
    }
  }
  if constexpr (ITEMS > 0) {
    if (!weight) return;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
      const int at = threadIdx.x + k * blockDim.x;
      if (at >= packets) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) sums[at * N + i] = total[k * N + i];
    }
  }
}

// Column sums of partial (lanes, channels), in the order of the lanes: the same result every time.
template <class T>
__global__ void __launch_bounds__(256) sum_columns_kernel(const float* partial, T* grad_weight, int lanes, int channels) {
  __shared__ float shared[8][33];
  const int column = blockIdx.x * 32 + threadIdx.x;
  float total = 0.f;
  if (column < channels) {
    for (int lane = threadIdx.y; lane < lanes; lane += 8) total += partial[int64_t(lane) * channels + column];
  }
  shared[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y || column >= channels) return;
  for (int y = 1; y < 8; ++y) total += shared[y][threadIdx.x];
  narrow(total, grad_weight[column]);
}

// ---- host ------------------------------------------------------------------------------------------------------

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch() {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "fastllm rms_norm: ", cudaGetErrorString(error));
}

template <class F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "fastllm: the CUDA kernels take float32, bfloat16 and float16 tensors");
  }
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Threads along a row for `items` packets each, or none if a block of `most` threads cannot hold it.
int threads_for(int64_t packets, int items, int most) {
  const int64_t threads = (packets + 32 * items - 1) / (32 * items) * 32;
  return threads <= most ? int(threads) : 0;
}

dim3 block_for(int threads) { return dim3(threads, threads == 32 ? 4 : 1); }

template <class T, int N>
void launch_forward(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int channels, float eps, float offset,
                    cudaStream_t stream) {
  const auto launch = [&](auto kernel, int threads) {
    const dim3 block = block_for(threads);
    const int64_t blocks = std::min<int64_t>((rows + block.y - 1) / block.y, INT32_MAX);
    kernel<<<dim3(unsigned(blocks)), block, 0, stream>>>(x, weight, y, rstd, rows, channels, eps, offset);
  };
  const int64_t packets = channels / N;
  if (const int threads = threads_for(packets, 1, forward_threads(1))) return launch(forward_kernel<T, N, 1>, threads);
  if (const int threads = threads_for(packets, 2, forward_threads(2))) return launch(forward_kernel<T, N, 2>, threads);
  if (const int threads = threads_for(packets, 4, forward_threads(4))) return launch(forward_kernel<T, N, 4>, threads);
  launch(forward_kernel<T, N, 0>, forward_threads(0));
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> weight, double eps, double weight_offset) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  x = torch::stable::contiguous(x);
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  STD_TORCH_CHECK(channels <= INT32_MAX, "fastllm rms_norm: the last dimension must be below 2^31, got ", channels);
  const auto sizes = x.sizes();
  Tensor y = torch::stable::new_empty(x, sizes);
  Tensor rstd = torch::stable::new_empty(x, sizes.slice(0, sizes.size() - 1), ScalarType::Float);
  if (rows == 0) return {y, rstd};
  if (weight) weight = torch::stable::contiguous(torch::stable::to(*weight, x.scalar_type()));
  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int wide = 16 / sizeof(T);
    const T *from = (const T*)x.const_data_ptr(), *w = weight ? (const T*)weight->const_data_ptr() : nullptr;
    T* to = (T*)y.mutable_data_ptr();
    const bool packed = channels % wide == 0 && aligned(from) && aligned(to) && aligned(w);
    const auto launch = packed ? launch_forward<T, wide> : launch_forward<T, 1>;
    launch(from, w, to, (float*)rstd.mutable_data_ptr(), rows, int(channels), float(eps), float(weight_offset),
           current_stream(x));
  });
  check_launch();
  return {y, rstd};
}

struct BackwardShape {
  int threads, items;
};

BackwardShape backward_shape(int64_t packets) {
  if (const int threads = threads_for(packets, 1, backward_threads)) return {threads, 1};
  if (const int threads = threads_for(packets, 4, backward_threads)) return {threads, 4};
  return {backward_threads, 0};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_y, Tensor x, std::optional<Tensor> weight, Tensor rstd, double,
                                             double weight_offset) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  grad_y = torch::stable::contiguous(grad_y);
  x = torch::stable::contiguous(x);
  rstd = torch::stable::contiguous(rstd);
  const int64_t channels = x.size(x.dim() - 1), rows = channels ? x.numel() / channels : 0;
  STD_TORCH_CHECK(channels <= INT32_MAX, "fastllm rms_norm: the last dimension must be below 2^31, got ", channels);
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_weight = weight ? torch::stable::new_empty(*weight, weight->sizes()) : torch::stable::new_empty(x, {0});
  if (rows == 0) {
    torch::stable::zero_(grad_weight);
    return {grad_x, grad_weight};
  }
  std::optional<Tensor> w;
  if (weight) w = torch::stable::contiguous(torch::stable::to(*weight, x.scalar_type()));
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, x.get_device_index());
  const cudaStream_t stream = current_stream(x);

  dispatch(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int wide = 16 / sizeof(T);
    const T *from_grad = (const T*)grad_y.const_data_ptr(), *from_x = (const T*)x.const_data_ptr();
    const T* weights = w ? (const T*)w->const_data_ptr() : nullptr;
    T* to = (T*)grad_x.mutable_data_ptr();
    const bool packed =
        channels % wide == 0 && aligned(from_grad) && aligned(from_x) && aligned(weights) && aligned(to);
    const BackwardShape shape = backward_shape(packed ? channels / wide : channels);
    const dim3 block = block_for(shape.threads);
    const int64_t resident = int64_t(processors) * std::max(1, 1024 / int(block.x * block.y));  // blocks a chip holds
    const int64_t blocks = std::min<int64_t>((rows + block.y - 1) / block.y, resident), lanes = blocks * block.y;
    Tensor partial = torch::stable::new_empty(x, {weight ? lanes : 0, channels}, ScalarType::Float);
    if (shape.items == 0) torch::stable::zero_(partial);
    const auto launch = [&](auto kernel) {
      kernel<<<dim3(unsigned(blocks)), block, 0, stream>>>(from_grad, from_x, weights,
                                                           (const float*)rstd.const_data_ptr(), to,
                                                           (float*)partial.mutable_data_ptr(), rows, int(channels),
                                                           float(weight_offset));
    };
    switch (shape.items * 2 + packed) {
      case 0: launch(backward_kernel<T, 1, 0>); break;
      case 1: launch(backward_kernel<T, wide, 0>); break;
      case 2: launch(backward_kernel<T, 1, 1>); break;
      case 3: launch(backward_kernel<T, wide, 1>); break;
      case 8: launch(backward_kernel<T, 1, 4>); break;
      case 9: launch(backward_kernel<T, wide, 4>); break;
    }
    check_launch();
    if (!weight) return;
    dispatch(grad_weight.scalar_type(), [&](auto weight_type) {
      using W = decltype(weight_type);
      sum_columns_kernel<W><<<dim3(unsigned((channels + 31) / 32)), dim3(32, 8), 0, stream>>>(
          (const float*)partial.const_data_ptr(), (W*)grad_weight.mutable_data_ptr(), int(lanes), int(channels));
    });
    check_launch();
  });
  return {grad_x, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastllm, CUDA, m) {
  m.impl("rms_norm_cuda", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward_cuda", TORCH_BOX(&rms_norm_backward));
}
