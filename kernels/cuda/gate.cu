// y = max(log(sigmoid(x + bias)) / normalizer, clamp_min), and the same of a low-rank product.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/gate_projection.h"
#include "kernels/kernels.h"

namespace gla {
namespace {

struct Gate {
  float normalizer;
  bool clamps;
  float min;

  template <typename Args>
  static Gate Of(const Args& a) {
    return {a.normalizer, a.clamp_min != nullptr, a.clamp_min == nullptr ? 0.0f : *a.clamp_min};
  }
  __device__ float At(float x) const {
    // log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|)): no overflow, full precision at both ends.
    // A selection and not fminf, fmaxf: those would swallow a NaN.
    const float gate = ((x > 0 ? 0.0f : x) - log1pf(expf(-fabsf(x)))) / normalizer;
    return clamps && gate < min ? min : gate;
  }
};

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    LogSigmoidGateKernel(const LogSigmoidGateArgs a, Gate gate, int blocks_per_row) {
  WaitForPrevious();
  AllowNext();
  const int64_t row = blockIdx.x / blocks_per_row;
  const int column = static_cast<int>(blockIdx.x % blocks_per_row) * kThreads + threadIdx.x;
  if (column >= a.dim) return;
  float x = a.x[row * a.dim + column];
  if (a.bias != nullptr) x += a.bias[column];
  a.y[row * a.dim + column] = gate.At(x);
}

// A thread to a column and kRows rows, whose inputs the block shares. An output is one chain in the
// order of the inputs.
constexpr int kMostInputs = 64, kColumns = 128, kRows = 8;

template <typename T>
__global__ void __launch_bounds__(kColumns)
    GateProjectionKernel(const GateProjectionArgs a, const T* weight, int in, int out,
                         int64_t weight_stride, Gate gate, int blocks_per_row) {
  constexpr int kPiece = 16 / sizeof(T);
  __shared__ __align__(16) float x[kRows][kMostInputs];
  const int64_t row0 = int64_t{blockIdx.x} / blocks_per_row * kRows;
  const int column = static_cast<int>(blockIdx.x % blocks_per_row) * kColumns + threadIdx.x;
  const bool valid = column < out;
  uint4 weights[kMostInputs / kPiece];  // zeros beyond `in`
#pragma unroll
  for (int i = 0; i < kMostInputs / kPiece; ++i) {
    weights[i] = {};
    if (valid && i * kPiece < in) {
      weights[i] = reinterpret_cast<const uint4*>(weight + column * weight_stride)[i];
    }
  }
  const float bias = valid && a.bias != nullptr ? a.bias[column] : 0;
  WaitForPrevious();
  AllowNext();
  for (int i = threadIdx.x; i < kRows * kMostInputs; i += kColumns) {
    const int r = i / kMostInputs, c = i % kMostInputs;
    const bool is_there = c < in && row0 + r < a.rows;
    x[r][c] = is_there ? ToFloat(static_cast<const T*>(a.x)[(row0 + r) * a.x_stride + c]) : 0;
  }
  __syncthreads();
  float sum[kRows] = {};
#pragma unroll
  for (int i = 0; i < kMostInputs / 4; ++i) {
    if (i * 4 >= in) break;
    const float4 w = LoadFour(reinterpret_cast<const T*>(weights) + 4 * i);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float4 four = LoadFour(&x[r][4 * i]);
      sum[r] = fmaf(four.w, w.w, fmaf(four.z, w.z, fmaf(four.y, w.y, fmaf(four.x, w.x, sum[r]))));
    }
  }
  if (!valid) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (row0 + r < a.rows) a.y[(row0 + r) * out + column] = gate.At(sum[r] + bias);
  }
}

}  // namespace

void LogSigmoidGate(Device& device, const LogSigmoidGateArgs& a) {
  if (a.rows == 0) return;
  const int blocks_per_row = CeilDiv(a.dim, kThreads);
  LaunchOverlapped(device, LogSigmoidGateKernel,
                   {.blocks = GridOf(int64_t{a.rows} * blocks_per_row), .threads = kThreads}, a,
                   Gate::Of(a), blocks_per_row);
}

void GateProjection(Device& device, const GateProjectionArgs& a) {
  const PackedWeight& w = *a.weight;
  GLA_REQUIRES(a.x_dtype == w.dtype(), "on CUDA a weight is multiplied in its own type");
  if (a.rows == 0) return;
  if (w.in() > kMostInputs) return ProductThenGate(device, a);
  const int blocks_per_row = CeilDiv(w.out(), kColumns);
  const int64_t blocks = int64_t{CeilDiv(a.rows, kRows)} * blocks_per_row;
  WithActType(a.x_dtype, [&]<typename T>() {
    LaunchOverlapped(device, GateProjectionKernel<T>,
                     {.blocks = GridOf(blocks), .threads = kColumns}, a,
                     static_cast<const T*>(w.data()), w.in(), w.out(),
                     WeightStride(w.in(), w.dtype()), Gate::Of(a), blocks_per_row);
  });
}

}  // namespace gla
