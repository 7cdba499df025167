// The element-wise part of a feature map: one warp to each head of each row.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/feature_map.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads) FeatureMapKernel(const FeatureMapArgs a) {
  WaitForPrevious();
  AllowNext();
  const int item = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (item >= a.rows * a.heads) return;  // a whole warp
  const int64_t row = item / a.heads, head = item % a.heads;
  const int lane = threadIdx.x % 32;
  const int64_t from = row * a.x_stride + head * a.dim;
  const T* x = static_cast<const T*>(a.x) + from;
  const T* x2 = a.x2 == nullptr ? nullptr : static_cast<const T*>(a.x2) + from;
  T* y = static_cast<T*>(a.y) + row * a.y_stride + head * a.out_dim;

  SoftmaxTerms terms = {0.0f, 0.0f};
  if (a.map == FeatureMap::kSoftmax2) terms = FindSoftmaxTerms(x, a.dim, lane);
  float divisor = 1;
  if (a.normalize) {
    float total = 0;
    for (int i = lane; i < a.out_dim; i += 32) total += Map(a.map, x, x2, a.dim, i, terms);
    divisor = WarpSum(total) + 1e-4f;
  }
  // In place (y == x) is safe: it is only asked for where output i needs input i alone.
  for (int i = lane; i < a.out_dim; i += 32) {
    const float value = Map(a.map, x, x2, a.dim, i, terms);
    y[i] = FromFloat<T>(a.normalize ? value / divisor : value);
  }
}

}  // namespace

void ApplyFeatureMap(Device& device, const FeatureMapArgs& a) {
  const int factor = a.map == FeatureMap::kSoftmax2 ? 2 : a.map == FeatureMap::kDpfp ? 8 : 1;
  GLA_REQUIRES(a.out_dim == factor * a.dim, "the map's output size");
  GLA_REQUIRES(factor == 1 || a.x != a.y, "only maps that keep the size work in place");
  GLA_REQUIRES((a.map == FeatureMap::kProduct) == (a.x2 != nullptr), "x2 belongs to kProduct");
  const int64_t items = int64_t{a.rows} * a.heads;
  if (items == 0) return;
  GLA_REQUIRES(items < (int64_t{1} << 31), "rows times heads");
  const unsigned grid = GridOf(CeilDiv(items, int64_t{kThreads / 32}));
  WithActType(a.dtype, [&]<typename T>() {
    LaunchOverlapped(device, FeatureMapKernel<T>, {.blocks = grid, .threads = kThreads}, a);
  });
}

}  // namespace gla
