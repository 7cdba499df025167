// The element-wise part of a feature map, head by head.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/feature_map.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <cmath>
#include <vector>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// One head as float32: x [dim], x2 [dim] (kProduct), y [out_dim]; x and y may be the same.
void MapHead(const FeatureMapArgs& a, const float* x, const float* x2, float* y) {
  const size_t dim = a.dim;
  switch (a.map) {
    case FeatureMap::kIdentity:
      return ForVectors(
          dim, [=](auto d, size_t i) HWY_ATTR { hn::StoreU(hn::LoadU(d, x + i), d, y + i); });
    case FeatureMap::kRelu:
      return ForVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        hn::StoreU(hn::Max(hn::LoadU(d, x + i), hn::Zero(d)), d, y + i);
      });
    case FeatureMap::kSquaredRelu:
      return ForVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        const auto v = hn::Max(hn::LoadU(d, x + i), hn::Zero(d));
        hn::StoreU(hn::Mul(v, v), d, y + i);
      });
    case FeatureMap::kElu:  // x + 1, or exp(x) below 0
      return ForVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        const auto v = hn::LoadU(d, x + i), zero = hn::Zero(d);
        const auto below = ExpOfNegative(d, hn::IfThenElse(hn::Gt(v, zero), zero, v));
        hn::StoreU(hn::IfThenElse(hn::Gt(v, zero), hn::Add(v, hn::Set(d, 1.0f)), below), d, y + i);
      });
    case FeatureMap::kSilu:
      return ForVectors(dim, [=](auto d, size_t i)
                                 HWY_ATTR { hn::StoreU(Silu(d, hn::LoadU(d, x + i)), d, y + i); });
    case FeatureMap::kSigmoid:
      return ForVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        hn::StoreU(Sigmoid(d, hn::LoadU(d, x + i)), d, y + i);
      });
    case FeatureMap::kGelu:  // 0.5 x (1 + tanh(u)) = x sigmoid(2 u)
      return ForVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        const auto v = hn::LoadU(d, x + i);
        const auto cubic = hn::MulAdd(hn::Mul(v, v), hn::Set(d, 0.044715f), hn::Set(d, 1.0f));
        const auto u = hn::Mul(hn::Mul(v, hn::Set(d, 0.7978845608f)), cubic);
        hn::StoreU(hn::Mul(v, Sigmoid(d, hn::Add(u, u))), d, y + i);
      });
    case FeatureMap::kProduct:
      return ForVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        hn::StoreU(hn::Mul(hn::LoadU(d, x + i), hn::LoadU(d, x2 + i)), d, y + i);
      });
    case FeatureMap::kSoftmax2: {  // of [2 x, -2 x]; the largest is 2 |x|'s largest
      float largest = 0;
      for (size_t i = 0; i < dim; ++i) largest = std::fmax(largest, std::fabs(x[i]));
      const float shift = 2 * largest;
      const float sum = SumVectors(dim, [=](auto d, size_t i) HWY_ATTR {
        const auto twice = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, 2.0f)), s = hn::Set(d, shift);
        const auto up = ExpOfNegative(d, hn::Sub(twice, s));
        const auto down = ExpOfNegative(d, hn::Sub(hn::Neg(twice), s));
        hn::StoreU(up, d, y + i);
        hn::StoreU(down, d, y + dim + i);
        return hn::Add(up, down);
      });
      return ForVectors(2 * dim, [=](auto d, size_t i) HWY_ATTR {
        hn::StoreU(hn::Div(hn::LoadU(d, y + i), hn::Set(d, sum)), d, y + i);
      });
    }
    case FeatureMap::kDpfp: {  // r = relu[x, -x]; y = r r rolled by 1, r r rolled by 2, ...
      const size_t n = 2 * dim;
      const auto relu = [=](size_t i) { return std::fmax(i < dim ? x[i] : -x[i - dim], 0.0f); };
      for (size_t roll = 1; roll <= 4; ++roll) {
        for (size_t i = 0; i < n; ++i) y[(roll - 1) * n + i] = relu(i) * relu((i + n - roll) % n);
      }
      return;
    }
  }
}

template <typename T>
void FeatureMapOf(const FeatureMapArgs& a, int64_t begin, int64_t end) {
  thread_local std::vector<float> scratch;
  scratch.resize(2 * a.dim + a.out_dim);
  float* x = scratch.data();
  float* x2 = x + a.dim;
  float* y = x2 + a.dim;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / a.heads, head = i % a.heads;
    const int64_t from = row * a.x_stride + head * a.dim;
    Convert(static_cast<const T*>(a.x) + from, x, a.dim);
    if (a.map == FeatureMap::kProduct) Convert(static_cast<const T*>(a.x2) + from, x2, a.dim);
    MapHead(a, x, x2, y);
    if (a.normalize) {
      const float sum =
          SumVectors(a.out_dim, [=](auto d, size_t c) HWY_ATTR { return hn::LoadU(d, y + c); });
      ForVectors(a.out_dim, [=](auto d, size_t c) HWY_ATTR {
        hn::StoreU(hn::Div(hn::LoadU(d, y + c), hn::Set(d, sum + 1e-4f)), d, y + c);
      });
    }
    Convert(y, static_cast<T*>(a.y) + row * a.y_stride + head * a.out_dim, a.out_dim);
  }
}

void FeatureMapHeads(const FeatureMapArgs& a, int64_t begin, int64_t end) {
  WithActType(a.dtype, [&]<typename T>() { FeatureMapOf<T>(a, begin, end); });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(FeatureMapHeads);

void ApplyFeatureMap(Device& device, const FeatureMapArgs& a) {
  const int factor = a.map == FeatureMap::kSoftmax2 ? 2 : a.map == FeatureMap::kDpfp ? 8 : 1;
  GLA_CHECK(a.out_dim == factor * a.dim);
  GLA_CHECK((a.map == FeatureMap::kProduct) == (a.x2 != nullptr));
  ParallelFor(device, int64_t{a.rows} * a.heads, a.out_dim * kExpNs,
              [&](int64_t begin, int64_t end) {
                HWY_DYNAMIC_DISPATCH(FeatureMapHeads)(a, begin, end);
              });
}

}  // namespace gla
#endif  // HWY_ONCE
