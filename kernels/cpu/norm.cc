// y = x / sqrt(mean(x^2) + eps) * weight, times gate sigmoid(gate) when a gate is given.
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h
#include <cmath>

#include "kernels/cpu/common.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/kernels.h"

HWY_BEFORE_NAMESPACE();
namespace gla {
namespace HWY_NAMESPACE {

template <typename X, typename Y>
void RmsNormOf(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const size_t dim = a.dim;
  const float* weight = a.weight;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i / a.groups, group = i % a.groups;
    const X* x = static_cast<const X*>(a.x) + row * a.x_stride + group * a.dim;
    Y* y = static_cast<Y*>(a.y) + row * a.y_stride + group * a.dim;
    const Y* gate = a.gate == nullptr
                        ? nullptr
                        : static_cast<const Y*>(a.gate) + row * a.gate_stride + group * a.dim;
    float scale = 1;
    if (a.normalize) scale = 1 / std::sqrt(Dot(x, x, dim) / static_cast<float>(dim) + a.eps);
    ForVectors(dim, [=](auto d, size_t c) HWY_ATTR {
      auto v = hn::Mul(LoadFloats(d, x + c), hn::Set(d, scale));
      if (weight != nullptr) v = hn::Mul(v, hn::LoadU(d, weight + c));
      if (gate != nullptr) v = hn::Mul(v, Silu(d, LoadFloats(d, gate + c)));
      StoreFloats(d, v, y + c);
    });
  }
}

void RmsNormRows(const RmsNormArgs& a, int64_t begin, int64_t end) {
  WithActType(a.x_dtype, [&]<typename X>() {
    WithActType(a.y_dtype, [&]<typename Y>() { RmsNormOf<X, Y>(a, begin, end); });
  });
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace gla
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gla {
HWY_EXPORT(RmsNormRows);

void RmsNorm(Device& device, const RmsNormArgs& a) {
  const double item_ns = a.dim * (a.gate == nullptr ? 2 * kCopyNs : kExpNs + kCopyNs);
  ParallelFor(device, int64_t{a.rows} * a.groups, item_ns, [&](int64_t begin, int64_t end) {
    HWY_DYNAMIC_DISPATCH(RmsNormRows)(a, begin, end);
  });
}

}  // namespace gla
#endif  // HWY_ONCE
