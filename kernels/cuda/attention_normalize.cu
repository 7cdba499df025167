// What the normalized operator needs around the recurrence: columns copied and converted, one
// element to a thread, and the gradient of the quotient, one row to a warp.
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 256;

template <typename X, typename Y>
__global__ void __launch_bounds__(kThreads) CopyColumnsKernel(const CopyColumnsArgs a) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= a.rows * a.cols) return;
  const int64_t row = i / a.cols, col = i % a.cols;
  const float value =
      a.x == nullptr ? a.value : ToFloat(static_cast<const X*>(a.x)[row * a.x_stride + col]);
  static_cast<Y*>(a.y)[row * a.y_stride + col] = FromFloat<Y>(value);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) QuotientGradientKernel(const QuotientGradientArgs a) {
  const int64_t row = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  if (row >= a.rows) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  const T* d_o = static_cast<const T*>(a.d_o) + row * a.dim;
  float* sums = a.sums + row * (int64_t{a.dim} + 1);
  const float inverse = 1.0f / (sums[a.dim] + 1e-10f);
  float dot = 0;
  for (int i = lane; i < a.dim; i += 32) {
    const float d = ToFloat(d_o[i]);
    dot = fmaf(d, sums[i], dot);
    sums[i] = d * inverse;
  }
  dot = WarpSum(dot);
  __syncwarp();  // every lane has read the denominator that is replaced now
  if (lane == 0) sums[a.dim] = -dot * inverse * inverse;
}

}  // namespace

void CopyColumns(Device& device, const CopyColumnsArgs& a) {
  const int64_t elements = a.rows * a.cols;
  if (elements == 0) return;
  const cudaStream_t stream = Queue(device);
  const unsigned grid = GridOf(CeilDiv(elements, int64_t{kThreads}));
  WithInputType(a.x_dtype, [&]<typename X>() {
    WithInputType(a.y_dtype,
                  [&]<typename Y>() { CopyColumnsKernel<X, Y><<<grid, kThreads, 0, stream>>>(a); });
  });
  CUDA_CHECK(cudaGetLastError());
}

void QuotientGradient(Device& device, const QuotientGradientArgs& a) {
  if (a.rows == 0) return;
  const cudaStream_t stream = Queue(device);
  const unsigned grid = GridOf(CeilDiv(a.rows, int64_t{kThreads / 32}));
  WithInputType(a.dtype,
                [&]<typename T>() { QuotientGradientKernel<T><<<grid, kThreads, 0, stream>>>(a); });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
