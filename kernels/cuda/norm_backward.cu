// The gradients of y = x r weight swish(gate), r = 1 / sqrt(mean(x^2) + eps), for x and the gate.
//
// kThreads threads share one group of one row, as in norm.cu: which number depends on `dim` alone.
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kBlock = 256;

template <typename X, typename Y, int kThreads>
__global__ void __launch_bounds__(kBlock) RmsNormBackwardKernel(const RmsNormBackwardArgs a) {
  __shared__ float shared[kBlock / 32];
  const int item = blockIdx.x * (kBlock / kThreads) + threadIdx.x / kThreads;
  // A whole warp leaves together; with kThreads == kBlock there is one item to a block.
  if (item >= a.rows * a.groups) return;
  const int64_t row = item / a.groups, offset = int64_t{item % a.groups} * a.dim;
  const X* x = static_cast<const X*>(a.x) + row * a.x_stride + offset;
  const Y* dy = static_cast<const Y*>(a.dy) + row * a.dy_stride + offset;
  const Y* gate =
      a.gate == nullptr ? nullptr : static_cast<const Y*>(a.gate) + row * a.gate_stride + offset;
  X* dx = static_cast<X*>(a.dx) + row * a.dx_stride + offset;
  Y* dgate =
      a.dgate == nullptr ? nullptr : static_cast<Y*>(a.dgate) + row * a.dgate_stride + offset;
  const int first = threadIdx.x % kThreads;

  float scale = 1, along = 0;  // along: r^2 mean(x u)
  if (a.normalize) {
    float squares = 0, products = 0;
    for (int i = first; i < a.dim; i += kThreads) {
      const float value = ToFloat(x[i]);
      float u = ToFloat(dy[i]);
      if (a.weight != nullptr) u *= a.weight[i];
      if (gate != nullptr) u *= Silu(ToFloat(gate[i]));
      squares = fmaf(value, value, squares);
      products = fmaf(value, u, products);
    }
    if constexpr (kThreads == 32) {
      squares = WarpSum(squares);
      products = WarpSum(products);
    } else {
      squares = BlockSum<kThreads>(squares, shared);
      products = BlockSum<kThreads>(products, shared);
    }
    scale = 1.0f / sqrtf(squares / static_cast<float>(a.dim) + a.eps);
    along = scale * scale * products / static_cast<float>(a.dim);
  }
  for (int i = first; i < a.dim; i += kThreads) {
    const float value = ToFloat(x[i]);
    const float arriving = ToFloat(dy[i]) * (a.weight == nullptr ? 1.0f : a.weight[i]);
    const float g = gate == nullptr ? 0.0f : ToFloat(gate[i]);
    const float u = gate == nullptr ? arriving : arriving * Silu(g);
    dx[i] = FromFloat<X>(scale * (u - value * along));
    if (gate != nullptr) dgate[i] = FromFloat<Y>(arriving * (value * scale) * SiluSlope(g));
  }
}

}  // namespace

void RmsNormBackward(Device& device, const RmsNormBackwardArgs& a) {
  GLA_REQUIRES((a.gate == nullptr) == (a.dgate == nullptr), "dgate belongs to a gate");
  const int64_t items = int64_t{a.rows} * a.groups;
  if (items == 0) return;
  GLA_REQUIRES(items < (int64_t{1} << 31), "rows times groups");
  const cudaStream_t stream = Queue(device);
  WithActType(a.x_dtype, [&]<typename X>() {
    WithActType(a.y_dtype, [&]<typename Y>() {
      if (a.dim <= 512) {
        const unsigned grid = GridOf(CeilDiv(items, int64_t{kBlock / 32}));
        RmsNormBackwardKernel<X, Y, 32><<<grid, kBlock, 0, stream>>>(a);
      } else {
        RmsNormBackwardKernel<X, Y, kBlock><<<GridOf(items), kBlock, 0, stream>>>(a);
      }
    });
  });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
