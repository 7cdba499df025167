// The gradient of a feature map's element-wise part: one warp to each head of each row.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/feature_map.cuh"
#include "kernels/kernels.h"

namespace gla {
namespace {

constexpr int kThreads = 128;

// dy of a head as the bare map sees it: (dy - mean) / divisor, mean = 0 and divisor = 1 when the
// map is not normalized.
template <typename T>
struct MapGradient {
  const T* dy;
  float mean, divisor;

  __device__ float operator[](int i) const { return (ToFloat(dy[i]) - mean) / divisor; }
};

// r = relu[x, -x], y[j * n + i] = r_i r_(i - j - 1), all indices modulo n = 2 dim. Only one of x
// and -x is above 0.
template <typename T>
__device__ float DpfpGradient(const T* x, const MapGradient<T>& dy, int dim, int i) {
  const int n = 2 * dim;
  const float value = ToFloat(x[i]);
  const auto relu = [=](int j) { return Relu(j < dim ? ToFloat(x[j]) : -ToFloat(x[j - dim])); };
  const int at = value > 0 ? i : dim + i;
  float sum = 0;
  for (int roll = 1; roll <= 4; ++roll) {
    const int block = (roll - 1) * n, before = (at + 4 * n - roll) % n, after = (at + roll) % n;
    sum += dy[block + at] * relu(before) + dy[block + after] * relu(after);
  }
  return value == 0 ? 0.0f : value > 0 ? sum : -sum;
}

// The derivative of a map that takes each element by itself.
__device__ float Slope(FeatureMap map, float x) {
  switch (map) {
    case FeatureMap::kRelu:
      return x <= 0 ? 0.0f : 1.0f;
    case FeatureMap::kSquaredRelu:
      return 2.0f * Relu(x);
    case FeatureMap::kElu:
      return x > 0 ? 1.0f : expf(x);
    case FeatureMap::kSilu:
      return SiluSlope(x);
    case FeatureMap::kSigmoid: {
      const float s = Sigmoid(x);
      return fmaf(-s, s, s);
    }
    case FeatureMap::kGelu: {  // of x sigmoid(w), w = 2 sqrt(2 / pi) (x + 0.044715 x^3)
      // Beyond 20 the slope is 0 or 1 in float32, and x dw would overflow before it vanishes.
      x = x > 20.0f ? 20.0f : x < -20.0f ? -20.0f : x;
      const float square = x * x;
      const float w = 1.5957691216f * x * fmaf(square, 0.044715f, 1.0f);
      const float dw = 1.5957691216f * fmaf(square, 3 * 0.044715f, 1.0f);
      const float s = Sigmoid(w);
      return fmaf(fmaf(-s, s, s), x * dw, s);
    }
    default:
      return 1;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    FeatureMapBackwardKernel(const FeatureMapBackwardArgs a) {
  const int item = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (item >= a.rows * a.heads) return;  // a whole warp
  const int64_t row = item / a.heads, head = item % a.heads;
  const int lane = threadIdx.x % 32;
  const int64_t from = row * a.x_stride + head * a.dim, to = row * a.dx_stride + head * a.dim;
  const T* x = static_cast<const T*>(a.x) + from;
  const T* x2 = a.x2 == nullptr ? nullptr : static_cast<const T*>(a.x2) + from;
  T* dx = static_cast<T*>(a.dx) + to;
  T* dx2 = a.dx2 == nullptr ? nullptr : static_cast<T*>(a.dx2) + to;
  MapGradient<T> dy = {static_cast<const T*>(a.dy) + row * a.dy_stride + head * a.out_dim, 0.0f,
                       1.0f};
  SoftmaxTerms terms = {0.0f, 0.0f};
  if (a.map == FeatureMap::kSoftmax2) terms = FindSoftmaxTerms(x, a.dim, lane);
  const auto map_at = [&](int i) { return Map(a.map, x, x2, a.dim, i, terms); };
  if (a.normalize) {
    float total = 0, products = 0;
    for (int i = lane; i < a.out_dim; i += 32) {
      const float value = map_at(i);
      total += value;
      products = fmaf(dy[i], value, products);
    }
    const float divisor = WarpSum(total) + 1e-4f;
    dy.mean = WarpSum(products) / divisor;
    dy.divisor = divisor;
  }
  float mean = 0;  // kSoftmax2: sum(dy y)
  if (a.map == FeatureMap::kSoftmax2) {
    for (int i = lane; i < a.out_dim; i += 32) mean = fmaf(dy[i], map_at(i), mean);
    mean = WarpSum(mean);
  }
  for (int i = lane; i < a.dim; i += 32) {
    float gradient;
    if (a.map == FeatureMap::kSoftmax2) {  // y (dy - sum(dy y)) for the exponents 2 x and -2 x
      const int j = a.dim + i;
      gradient = 2.0f * (map_at(i) * (dy[i] - mean) - map_at(j) * (dy[j] - mean));
    } else if (a.map == FeatureMap::kDpfp) {
      gradient = DpfpGradient(x, dy, a.dim, i);
    } else if (a.map == FeatureMap::kProduct) {
      gradient = dy[i] * ToFloat(x2[i]);
      dx2[i] = FromFloat<T>(dy[i] * ToFloat(x[i]));
    } else {
      gradient = dy[i] * Slope(a.map, ToFloat(x[i]));
    }
    dx[i] = FromFloat<T>(gradient);
  }
}

}  // namespace

void FeatureMapBackward(Device& device, const FeatureMapBackwardArgs& a) {
  const int factor = a.map == FeatureMap::kSoftmax2 ? 2 : a.map == FeatureMap::kDpfp ? 8 : 1;
  GLA_REQUIRES(a.out_dim == factor * a.dim, "the map's output size");
  GLA_REQUIRES((a.map == FeatureMap::kProduct) == (a.x2 != nullptr), "x2 belongs to kProduct");
  GLA_REQUIRES((a.map == FeatureMap::kProduct) == (a.dx2 != nullptr), "dx2 belongs to kProduct");
  const int64_t items = int64_t{a.rows} * a.heads;
  if (items == 0) return;
  GLA_REQUIRES(items < (int64_t{1} << 31), "rows times heads");
  const cudaStream_t stream = Queue(device);
  const unsigned grid = GridOf(CeilDiv(items, int64_t{kThreads / 32}));
  WithActType(a.dtype,
              [&]<typename T>() { FeatureMapBackwardKernel<T><<<grid, kThreads, 0, stream>>>(a); });
  CUDA_CHECK(cudaGetLastError());
}

}  // namespace gla
