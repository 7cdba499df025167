// One head of a feature map, before it is normalized; compiled once per instruction set.

#if defined(GLA_KERNELS_CPU_FEATURE_MAP_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GLA_KERNELS_CPU_FEATURE_MAP_INL_H_
#undef GLA_KERNELS_CPU_FEATURE_MAP_INL_H_
#else
#define GLA_KERNELS_CPU_FEATURE_MAP_INL_H_
#endif

#include <cmath>
#include <cstddef>

#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

// One head as float32: x [dim], x2 [dim] (kProduct), y [out_dim]; x and y may be the same.
inline void MapHead(FeatureMap map, size_t dim, const float* x, const float* x2, float* y) {
  switch (map) {
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

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#endif  // GLA_KERNELS_CPU_FEATURE_MAP_INL_H_
