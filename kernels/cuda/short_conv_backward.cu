// The gradient of the causal depthwise convolution, for its rows and the inputs carried into them.
//
// A thread to each input and channel: at most `width` outputs took the input in, and what each of
// them was before SiLU is computed again. Rows of the call and states are a launch each.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/sequences.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxWidth = 8;

// Rows [first, first + len) of sequence `seq`; its inputs are counted from `first`, those of the
// initial state from -(width - 1).
struct Span {
  int seq;
  int64_t first, len;
};

template <typename T>
__device__ float InputAt(const ShortConvBackwardArgs& a, const Span& span, int64_t t, int c) {
  if (t >= 0) return ToFloat(static_cast<const T*>(a.x)[(span.first + t) * a.x_stride + c]);
  if (a.initial_state == nullptr) return 0.0f;
  const int tail = a.width - 1;
  return a.initial_state[(int64_t{span.seq} * tail + tail + t) * a.channels + c];
}

// The gradient of the convolution at row t of the span, before SiLU.
template <typename T>
__device__ float InnerGradient(const ShortConvBackwardArgs& a, const Span& span, int64_t t, int c) {
  const float dy = ToFloat(static_cast<const T*>(a.dy)[(span.first + t) * a.dy_stride + c]);
  if (!a.silu) return dy;
  float p = a.bias == nullptr ? 0.0f : a.bias[c];
  for (int w = 0; w < a.width; ++w) {
    const float x = InputAt<T>(a, span, t - (a.width - 1) + w, c);
    p = fmaf(a.weight[int64_t{c} * a.width + w], x, p);
  }
  return dy * SiluSlope(p);
}

// The gradient of input s of the span, s >= -(width - 1).
template <typename T>
__device__ float InputGradient(const ShortConvBackwardArgs& a, const Span& span, int64_t s, int c) {
  const int tail = a.width - 1;
  float sum = 0;
  for (int w = tail; w >= 0; --w) {  // the output that weighs it with w is at t
    const int64_t t = s + tail - w;
    if (t < 0 || t >= span.len) continue;
    sum = fmaf(a.weight[int64_t{c} * a.width + w], InnerGradient<T>(a, span, t, c), sum);
  }
  const int64_t in_final = s - (span.len - tail);
  if (a.d_final_state != nullptr && in_final >= 0) {
    sum += a.d_final_state[(int64_t{span.seq} * tail + in_final) * a.channels + c];
  }
  return sum;
}

__device__ Span SpanOf(const ShortConvBackwardArgs& a, int seq) {
  const int64_t first = a.cu_seqlens[seq];
  return {seq, first, a.cu_seqlens[seq + 1] - first};
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ShortConvBackwardKernel(const ShortConvBackwardArgs a, int blocks_per_row) {
  const int row = blockIdx.x / blocks_per_row;
  const int c = static_cast<int>(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x;
  if (c >= a.channels) return;
  const Span span = SpanOf(a, SequenceOf(a.cu_seqlens, a.num_seqs, row));
  static_cast<T*>(a.dx)[row * a.dx_stride + c] =
      FromFloat<T>(InputGradient<T>(a, span, row - span.first, c));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    ShortConvStateBackwardKernel(const ShortConvBackwardArgs a, int blocks_per_input) {
  const int tail = a.width - 1;
  const int item = blockIdx.x / blocks_per_input;  // seq, then which of its carried inputs
  const int c = static_cast<int>(blockIdx.x % blocks_per_input) * kThreads + threadIdx.x;
  if (c >= a.channels) return;
  const Span span = SpanOf(a, item / tail);
  a.d_initial_state[int64_t{item} * a.channels + c] =
      InputGradient<T>(a, span, item % tail - tail, c);
}

}  // namespace

void ShortConvBackward(Device& device, const ShortConvBackwardArgs& a) {
  GLA_REQUIRES(a.width >= 1 && a.width <= kMaxWidth, "the convolution's width is 1 to 8");
  const cudaStream_t stream = Queue(device);
  const int blocks = CeilDiv(a.channels, kThreads);
  const int64_t carried = a.d_initial_state == nullptr ? 0 : int64_t{a.num_seqs} * (a.width - 1);
  WithActType(a.dtype, [&]<typename T>() {
    if (a.num_rows > 0) {
      const unsigned grid = GridOf(int64_t{a.num_rows} * blocks);
      ShortConvBackwardKernel<T><<<grid, kThreads, 0, stream>>>(a, blocks);
      CUDA_CHECK(cudaGetLastError());
    }
    if (carried > 0) {
      const unsigned grid = GridOf(carried * blocks);
      ShortConvStateBackwardKernel<T><<<grid, kThreads, 0, stream>>>(a, blocks);
      CUDA_CHECK(cudaGetLastError());
    }
  });
}

}  // namespace gla
