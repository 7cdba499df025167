// The element-wise part of a feature map: one warp to each head of each row.
#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 128;

// max(x, 0), but NaN stays NaN.
__device__ float Relu(float x) { return x < 0 ? 0.0f : x; }

// Output i of a head; `shift` and `sum` are kSoftmax2's largest exponent and sum.
template <typename T>
__device__ float Map(FeatureMap map, const T* x, const T* x2, int dim, int i, float shift,
                     float sum) {
  switch (map) {
    case FeatureMap::kIdentity:
      return ToFloat(x[i]);
    case FeatureMap::kRelu:
      return Relu(ToFloat(x[i]));
    case FeatureMap::kElu: {
      const float value = ToFloat(x[i]);
      return value > 0 ? value + 1.0f : expf(value);
    }
    case FeatureMap::kSilu:
      return Silu(ToFloat(x[i]));
    case FeatureMap::kSigmoid:
      return Sigmoid(ToFloat(x[i]));
    case FeatureMap::kSquaredRelu: {
      const float value = Relu(ToFloat(x[i]));
      return value * value;
    }
    case FeatureMap::kGelu: {
      const float value = ToFloat(x[i]);
      const float cubic = fmaf(value * value, 0.044715f, 1.0f);
      return 0.5f * value * (1.0f + tanhf(0.7978845608f * value * cubic));
    }
    case FeatureMap::kProduct:
      return ToFloat(x[i]) * ToFloat(x2[i]);
    case FeatureMap::kSoftmax2: {
      const float twice = i < dim ? 2.0f * ToFloat(x[i]) : -2.0f * ToFloat(x[i - dim]);
      return expf(twice - shift) / sum;
    }
    case FeatureMap::kDpfp: {  // r = relu[x, -x]; block j is r times r rolled by j + 1
      const int n = 2 * dim, at = i % n, rolled = (at + 4 * n - i / n - 1) % n;
      const float a = Relu(at < dim ? ToFloat(x[at]) : -ToFloat(x[at - dim]));
      const float b = Relu(rolled < dim ? ToFloat(x[rolled]) : -ToFloat(x[rolled - dim]));
      return a * b;
    }
  }
  return 0;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) FeatureMapKernel(const FeatureMapArgs a) {
  const int item = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (item >= a.rows * a.heads) return;  // a whole warp
  const int64_t row = item / a.heads, head = item % a.heads;
  const int lane = threadIdx.x % 32;
  const int64_t from = row * a.x_stride + head * a.dim;
  const T* x = static_cast<const T*>(a.x) + from;
  const T* x2 = a.x2 == nullptr ? nullptr : static_cast<const T*>(a.x2) + from;
  T* y = static_cast<T*>(a.y) + row * a.y_stride + head * a.out_dim;

  float shift = 0, sum = 0;
  if (a.map == FeatureMap::kSoftmax2) {  // of [2 x, -2 x]; the largest is 2 |x|'s largest
    for (int i = lane; i < a.dim; i += 32) shift = fmaxf(shift, fabsf(ToFloat(x[i])));
    shift = 2.0f * WarpMax(shift);
    for (int i = lane; i < a.dim; i += 32) {
      const float twice = 2.0f * ToFloat(x[i]);
      sum += expf(twice - shift) + expf(-twice - shift);
    }
    sum = WarpSum(sum);
  }
  float divisor = 1;
  if (a.normalize) {
    float total = 0;
    for (int i = lane; i < a.out_dim; i += 32) total += Map(a.map, x, x2, a.dim, i, shift, sum);
    divisor = WarpSum(total) + 1e-4f;
  }
  // In place (y == x) is safe: it is only asked for where output i needs input i alone.
  for (int i = lane; i < a.out_dim; i += 32) {
    const float value = Map(a.map, x, x2, a.dim, i, shift, sum);
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
  const cudaStream_t stream = Queue(device);
  const unsigned grid = GridOf(CeilDiv(items, int64_t{kThreads / 32}));
  WithActType(a.dtype,
              [&]<typename T>() { FeatureMapKernel<T><<<grid, kThreads, 0, stream>>>(a); });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
