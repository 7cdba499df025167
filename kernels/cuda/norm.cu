// y = x / sqrt(mean(x^2) + eps) * weight, times gate sigmoid(gate) when a gate is given.
//
// kThreads threads share one group of one row: a warp for the heads, a block for the hidden size.
// Which of the two depends on `dim` alone, and which kernel on it and on alignment, so a group's
// bits never depend on the rest of the call.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kBlock = 256;
constexpr int kBatch = 4;  // loads in flight before the first store, which the compiler cannot move

// What a group of kThreads threads works on.
template <typename X, typename Y, int kThreads>
struct NormItem {
  const X* x;
  Y* y;
  const Y* gate;

  // False when there is none: a whole warp, or the block.
  __device__ bool Find(const RmsNormArgs& a) {
    const int item = blockIdx.x * (kBlock / kThreads) + threadIdx.x / kThreads;
    if (item >= a.rows * a.groups) return false;
    const int64_t row = item / a.groups, offset = int64_t{item % a.groups} * a.dim;
    x = static_cast<const X*>(a.x) + row * a.x_stride + offset;
    y = static_cast<Y*>(a.y) + row * a.y_stride + offset;
    gate =
        a.gate == nullptr ? nullptr : static_cast<const Y*>(a.gate) + row * a.gate_stride + offset;
    return true;
  }
  // Of each thread's sum of squares.
  __device__ float Scale(const RmsNormArgs& a, float squares, float* shared) const {
    if constexpr (kThreads == 32) {
      squares = WarpSum(squares);
    } else {
      squares = BlockSum<kThreads>(squares, shared);
    }
    return 1.0f / sqrtf(squares / static_cast<float>(a.dim) + a.eps);
  }
};

template <typename X, typename Y, int kThreads>
__global__ void __launch_bounds__(kBlock) RmsNormKernel(const RmsNormArgs a) {
  __shared__ float shared[kBlock / 32];
  WaitForPrevious();
  AllowNext();
  NormItem<X, Y, kThreads> item;
  if (!item.Find(a)) return;
  const X* const x = item.x;
  Y* const y = item.y;
  const Y* const gate = item.gate;
  const int first = threadIdx.x % kThreads;
  float scale = 1;
  if (a.normalize) {
    float squares = 0;
#pragma unroll 4
    for (int i = first; i < a.dim; i += kThreads) {
      const float value = ToFloat(x[i]);
      squares = fmaf(value, value, squares);
    }
    scale = item.Scale(a, squares, shared);
  }
  for (int i0 = first; i0 < a.dim; i0 += kBatch * kThreads) {
    float value[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = i0 + j * kThreads;
      if (i >= a.dim) break;
      value[j] = ToFloat(x[i]) * scale;
      if (a.weight != nullptr) value[j] *= a.weight[i];
      if (gate != nullptr) value[j] *= Silu(ToFloat(gate[i]));
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = i0 + j * kThreads;
      if (i < a.dim) y[i] = FromFloat<Y>(value[j]);
    }
  }
}

// The same where rows allow loads of four neighbours and fit a thread's registers: each value is
// read once.
constexpr int kFours = 4;  // of a thread

template <typename X, typename Y, int kThreads>
__global__ void __launch_bounds__(kBlock) RmsNormFoursKernel(const RmsNormArgs a) {
  __shared__ float shared[kBlock / 32];
  WaitForPrevious();
  AllowNext();
  NormItem<X, Y, kThreads> item;
  if (!item.Find(a)) return;
  const X* const x = item.x;
  Y* const y = item.y;
  const Y* const gate = item.gate;
  const int first = 4 * (threadIdx.x % kThreads);
  float value[kFours][4];
  float squares = 0;
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const int i = first + j * 4 * kThreads;
    if (i < a.dim) LoadFour(x + i, value[j]);
  }
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    if (first + j * 4 * kThreads >= a.dim) break;
#pragma unroll
    for (int c = 0; c < 4; ++c) squares = fmaf(value[j][c], value[j][c], squares);
  }
  float scale = 1;
  if (a.normalize) {
    scale = item.Scale(a, squares, shared);
  }
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const int i = first + j * 4 * kThreads;
    if (i >= a.dim) break;
    float weight[4] = {1, 1, 1, 1}, swish[4] = {1, 1, 1, 1};
    if (a.weight != nullptr) LoadFour(a.weight + i, weight);
    if (gate != nullptr) {
      LoadFour(gate + i, swish);
#pragma unroll
      for (int c = 0; c < 4; ++c) swish[c] = Silu(swish[c]);
    }
    float out[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = value[j][c] * scale * weight[c] * swish[c];
    StoreFour(y + i, {out[0], out[1], out[2], out[3]});
  }
}

template <typename X, typename Y>
bool AllowsFours(const RmsNormArgs& a, int threads) {
  const auto allows = [](const void* p, int64_t stride, size_t size) {
    return IsAligned(p, 4 * size) && stride % 4 == 0;
  };
  return a.dim % 4 == 0 && a.dim <= 4 * kFours * threads && allows(a.x, a.x_stride, sizeof(X)) &&
         allows(a.y, a.y_stride, sizeof(Y)) && allows(a.gate, a.gate_stride, sizeof(Y)) &&
         allows(a.weight, 0, sizeof(float));
}

}  // namespace

void RmsNorm(Device& device, const RmsNormArgs& a) {
  const int64_t items = int64_t{a.rows} * a.groups;
  if (items == 0) return;
  GLA_REQUIRES(items < (int64_t{1} << 31), "rows times groups");
  WithActType(a.x_dtype, [&]<typename X>() {
    WithActType(a.y_dtype, [&]<typename Y>() {
      const bool fours = AllowsFours<X, Y>(a, a.dim <= 512 ? 32 : kBlock);
      if (a.dim <= 512) {
        const unsigned grid = GridOf(CeilDiv(items, int64_t{kBlock / 32}));
        const auto kernel = fours ? RmsNormFoursKernel<X, Y, 32> : RmsNormKernel<X, Y, 32>;
        LaunchOverlapped(device, kernel, {.blocks = grid, .threads = kBlock}, a);
      } else {
        const auto kernel = fours ? RmsNormFoursKernel<X, Y, kBlock> : RmsNormKernel<X, Y, kBlock>;
        LaunchOverlapped(device, kernel, {.blocks = GridOf(items), .threads = kBlock}, a);
      }
    });
  });
}

}  // namespace gla
