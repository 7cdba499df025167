// One head of a feature map, shared by its forward and its backward kernel.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/kernels.h"

namespace gla {

// max(x, 0), but NaN stays NaN.
__device__ inline float Relu(float x) { return x < 0 ? 0.0f : x; }

// kSoftmax2's largest exponent, and the sum of the exponentials below it.
struct SoftmaxTerms {
  float shift, sum;
};

// Of [2 x, -2 x], by a whole warp; the largest is 2 |x|'s largest.
template <typename T>
__device__ SoftmaxTerms FindSoftmaxTerms(const T* x, int dim, int lane) {
  float shift = 0, sum = 0;
  for (int i = lane; i < dim; i += 32) shift = fmaxf(shift, fabsf(ToFloat(x[i])));
  shift = 2.0f * WarpMax(shift);
  for (int i = lane; i < dim; i += 32) {
    const float twice = 2.0f * ToFloat(x[i]);
    sum += expf(twice - shift) + expf(-twice - shift);
  }
  return {shift, WarpSum(sum)};
}

// Output i of a head, before it is normalized.
template <typename T>
__device__ float Map(FeatureMap map, const T* x, const T* x2, int dim, int i,
                     const SoftmaxTerms& softmax) {
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
      return expf(twice - softmax.shift) / softmax.sum;
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

}  // namespace gla
